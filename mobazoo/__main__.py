"""``python -m mobazoo``."""

from mobazoo.cli import main

if __name__ == "__main__":
    main()
