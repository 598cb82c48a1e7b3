"""The study at reduced size: every kind of arm trained, measured and written; what is done is skipped."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from mobazoo.config.recipe import load_recipe
from mobazoo.errors import UnsupportedError
from tests.train.conftest import unsynced  # noqa: F401
from tools.study import __main__ as command
from tools.study import page
from tools.study.corpus import asked, make_data
from tools.study.measure import recall
from tools.study.recipe import Study

SMALL = [
    "source={path: stdlib, files: ['json/*.py', 'email/*.py'], min_chars: 2000, validation: 0.3}",
    "vocab=600",
    "documents=3",
    "recall={share: 0.3, facts: 3, words: 8, documents: 3}",
    "train={model: llama-tiny, config: {vocab_size: 600, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2,"
    " head_dim: 8}, length: 128, batch: 2, steps: 6, learning_rate: 1.0e-2, device: cpu}",
    "gain={fall: -9, trailing: -9, recall: -2}",
]
# Blocks for rows of 128.
BLOCKS = (64, 8), (32, 4), (16, 2)


def small(folder: Path, *more: str, name: str = "cpu.yaml") -> list[str]:
    """The shipped study with its own arms, and blocks for short rows."""
    text = (command.HERE / name).read_text()
    for large, fits in BLOCKS:
        text = re.sub(rf"block_size: {large}\b", f"block_size: {fits}", text)
    (folder / "study.yaml").write_text(text)
    where = [f"folder={folder / 'runs'}", f"page={folder / 'page.md'}"]
    return [str(folder / "study.yaml"), *where, *SMALL, *more]


def test_the_whole_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["__main__.py", "cpu"])
    given = small(tmp_path)
    assert command.main(given) == 0, capsys.readouterr().err
    study = load_recipe(Path(given[0]), given[1:], Study)
    results = [json.loads(path.read_text()) for path in sorted((tmp_path / "runs" / "results").iterdir())]
    assert len(results) == 11
    assert {(said["arm"], said["seed"]) for said in results} == {(run.arm, run.seed) for run in study.runs()}
    shares = {said["arm"]: said["loss"]["share_read"] for said in results}
    assert shares["full"] == shares["moba 64/3, then full"] == 1  # as trained at the end
    assert shares["local"] < shares["moba 64/3"] < shares["moba 64/3, last layer full"] < 1
    text = (tmp_path / "page.md").read_text()
    table = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [cells[0].lstrip("| ") for cells in table[2:10]] == list(study.arms)
    one = next(said for said in results if said["arm"] == "local")
    assert f"{one['loss']['mean']['mean']:.3f}" in table[3][3]
    assert str(tmp_path) not in text
    assert "<svg" in (tmp_path / "page.svg").read_text()
    written = (tmp_path / "page.md").read_text()
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.*")}
    assert command.main(given) == 0
    assert capsys.readouterr().err.count("done before") == 11
    assert (tmp_path / "page.md").read_text() == written
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.*")} == made
    # Nothing is learned in six steps, which the shipped bounds see before a third arm is trained.
    (tmp_path / "page.md").unlink()
    assert command.main([*given, "gain={}"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"error: study\.gain\.\w+: full attention gains .* would show nothing; train longer", said)
    assert "run 3" not in said
    assert not (tmp_path / "page.md").exists()


def test_recall_counts_answers(tmp_path: Path) -> None:
    given = small(tmp_path)
    study = load_recipe(Path(given[0]), given[1:], Study)
    tokenizer = make_data(study)
    documents = asked(study, tokenizer)
    assert documents == asked(study, tokenizer)
    for document in documents:
        assert len(document.ids) <= 128
        text = tokenizer.decode(document.ids)
        facts = dict(re.findall(r"# let (\w+) (\w+)\n", text))
        questions = re.findall(r"# ask (\w+) (\w+)\n", text)
        assert len(facts) == len(questions) == len(document.answers) == 3
        assert text.rindex("# let") < text.index("# ask")
        for (key, value), places in zip(questions, document.answers, strict=True):
            assert facts[key] == value == tokenizer.decode([document.ids[place] for place in places]).strip()

    class Knows:
        """Says the right token after the first question of a document and nowhere else."""

        device = torch.device("cpu")

        def __init__(self) -> None:
            self.at = iter(documents)

        def __call__(self, ids: torch.Tensor, use_cache: bool) -> object:
            document, logits = next(self.at), torch.zeros(1, ids.shape[1], 600)
            logits[..., 0] = 1
            for place in document.answers[0]:
                logits[0, place - 1, document.ids[place]] = 2
            return type("Output", (), {"logits": logits})

    found = recall(Knows(), documents, lambda *_: None)  # type: ignore[arg-type]
    assert (found["right"], found["asked"]) == (3, 9)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("arms={full: {}}", r"study\.arms: 'local' is missing"),
        ("arms.full.seeds=[]", r"study\.arms\.full\.seeds: none"),
        ("recall.share=1", r"study\.recall\.share: want a share between 0 and 1, got 1"),
        ("recall.facts=9", r"study\.recall\.facts: want 1 to 8, the words there are, got 9"),
        ("recall.words=500", r"study\.recall\.words: a vocabulary of 600 has \d+ words of one token, and .* need 1000"),
        ("recall={share: 0.3, facts: 8, words: 8, documents: 1}", r"study\.recall\.facts: 8 facts .* fit into 128"),
        ("source.min_chars=10000000", r"no document|0 documents are enough|no text is left"),
        ("train.batchh=3", r"unknown key 'batchh'"),
    ],
)
def test_errors(tmp_path: Path, more: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = small(tmp_path, more) if "facts: 8" not in more else [*small(tmp_path, more), "train.length=64"]
    assert command.main(given) == 2
    assert re.search(message.replace("128", "(128|64)"), capsys.readouterr().err)


def test_shipped_sizes_and_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.sizes() == ["cpu", "gpu"]
    kinds = []
    for name in command.sizes():
        study = load_recipe(command.HERE / f"{name}.yaml", [], Study)
        study.check()
        rules = [arm.attention[0] for arm in study.arms.values() if arm.attention]
        sizes = {
            rule["block_size"] * rule["top_k"] for rule in rules if rule["pattern"] == "moba" and rule["top_k"] > 1
        }
        assert len(sizes) == 1  # equal sparsity
        kinds.append([len(arm.seeds) for arm in study.arms.values()])
    assert kinds[0] == kinds[1]
    assert command.main([]) == 2
    assert command.main(["--help"]) == 0
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"study: its plot needs matplotlib, .*'mobazoo\[report\]'"):
        page.require_matplotlib()
