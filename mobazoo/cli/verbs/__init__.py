"""One module a verb: ``main`` (a Typer command), ``PLACE`` (panel and rank in the help), ``EXAMPLES``.

A verb that works by a recipe and can be a stage of ``mobazoo run`` also has ``resolve``, ``plan`` and ``execute``
(see ``mobazoo.cli.work``). Modules here import neither torch nor transformers; what they call they import when called.
"""
