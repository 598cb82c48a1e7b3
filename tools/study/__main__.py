"""``python -m tools.study SIZE [KEY=VALUE]...``: trains what is not done yet, and writes the page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mobazoo.cli.assemble import INTERRUPTED, TERMINATED, USER_ERROR
from mobazoo.cli.output import note, progress, say
from mobazoo.config.recipe import load_recipe
from mobazoo.errors import InputError, MobazooError, Stopped
from tools.study.corpus import asked, make_data
from tools.study.measure import do
from tools.study.page import require_matplotlib, write_page
from tools.study.recipe import FULL, LOCAL, Study

HERE = Path(__file__).parent


def main(given: list[str]) -> int:
    """Runs it; the exit code."""
    if not given or given[0] in ("-h", "--help"):
        say(f"python -m tools.study RECIPE [KEY=VALUE]...\nRECIPE: a file, or {', '.join(sizes())}")
        return 0 if given else USER_ERROR
    try:
        source = HERE / f"{given[0]}.yaml" if given[0] in sizes() else Path(given[0])
        study = load_recipe(source, given[1:], Study)
        study.check()
        conduct(study)
    except Stopped as stopped:
        note(str(stopped))
        return TERMINATED
    except MobazooError as error:
        note(f"error: {error}")
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def sizes() -> list[str]:
    """The recipes here."""
    return sorted(path.stem for path in HERE.glob("*.yaml"))


def conduct(study: Study) -> None:
    """Every run in turn; it stops after the first two if full attention gains nothing from far tokens.

    Raises:
        InputError: it gains too little; or whatever training and measuring raise.
    """
    require_matplotlib()
    tokenizer = make_data(study)
    questions = asked(study, tokenizer)
    runs, results = list(study.runs()), []
    for number, run in enumerate(runs, 1):
        name = f"run {number} of {len(runs)}: {run.arm}, seed {run.seed}"
        if run.result.exists():
            note(f"{name}: done before")
        else:
            note(name)
            with progress() as update:
                do(study, run, questions, update, note)
        results.append(json.loads(run.result.read_text("utf-8")))
        said = results[-1]
        loss, trailing = said["loss"]["mean"]["mean"], said["loss"]["trailing"]["mean"]
        note(f"{name}: loss {loss:.4f}, trailing {trailing:.4f}, recall {said['recall']['share']:.1%}")
        if number == 2:
            check_gain(study, *results)
    for path in write_page(study, results):
        say(f"wrote {path}")


def check_gain(study: Study, full: dict[str, Any], local: dict[str, Any]) -> None:
    """Whether these data, at this size, have something to learn from far away.

    Raises:
        InputError: they have not, so a comparison would show nothing.
    """
    assert (full["arm"], local["arm"]) == (FULL, LOCAL)
    trailing = full["loss"]["trailing"]["mean"]
    found = {
        "fall": full["loss"]["by_position"][0]["loss"]["mean"] - trailing,
        "trailing": local["loss"]["trailing"]["mean"] - trailing,
        "recall": full["recall"]["share"] - local["recall"]["share"],
    }
    said = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
    note(f"what full attention gains from far tokens: {said}")
    for name, value in found.items():
        least = getattr(study.gain, name)
        if value <= least:
            raise InputError(
                f"study.gain.{name}: full attention gains {value:.4f}, and more than {least} is wanted ({said}): the "
                "study would show nothing; train longer (train.tokens), or take other data"
            )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
