"""models, recipes, show, copy."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mobazoo.attention.native import library
from mobazoo.attention.pattern import Full, MoBA, Pattern
from mobazoo.cli import app
from mobazoo.cli.output import count, size, tokens
from mobazoo.config.models import model_names
from mobazoo.config.rules import LayerAttention
from mobazoo.config.shipped import MODELS, RECIPES, find, shipped
from mobazoo.explain import groups, keys_read, share_read


def call(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


def rows(text: str) -> list[list[str]]:
    return [line.split("\t") for line in text.splitlines()]


def brute(pattern: Pattern, length: int) -> int:
    """Keys counted query by query, block by block."""
    if isinstance(pattern, Full):
        return sum(t + 1 for t in range(length))
    size, earlier = pattern.block_size, pattern.top_k - 1
    return sum(t % size + 1 + min(t // size, earlier) * size for t in range(length))


@pytest.mark.parametrize("block", [1, 3, 4, 7])
@pytest.mark.parametrize("top_k", [1, 2, 3, 9])
def test_keys_read_is_exact(block: int, top_k: int) -> None:
    for length in range(1, 30):
        assert keys_read(MoBA(block, top_k), length) == brute(MoBA(block, top_k), length)
        assert keys_read(Full(), length) == brute(Full(), length)


def test_share_read_is_full_where_blocks_cover_the_length() -> None:
    layer = LayerAttention(MoBA(512, 3))
    assert share_read([layer], 1536) == 1
    assert share_read([layer], 1537) < 1


def test_share_read_is_the_mean_over_layers() -> None:
    # 8 tokens: full reads 36 keys, blocks of 4 alone read 10 + 10.
    assert share_read([LayerAttention(), LayerAttention(MoBA(4, 1))], 8) * 72 == 36 + 20


def test_equal_layers_stand_together() -> None:
    full, moba = LayerAttention(), LayerAttention(MoBA(4, 2))
    assert [(w, n) for w, n, _ in groups([moba] * 5 + [full])] == [("0-4", 5), ("5", 1)]
    assert [(w, n) for w, n, _ in groups([moba, full] * 3)] == [("0-4 by 2", 3), ("1-5 by 2", 3)]
    assert [w for w, _, _ in groups([moba, moba, full, moba])] == ["0-1, 3", "2"]


def test_numbers_as_people_write_them() -> None:
    assert [count(n) for n in (12, 1_054_000, 8_030_261_248)] == ["12", "1.05M", "8.03B"]
    assert [tokens(n) for n in (8192, 131072, 1 << 20, 1000)] == ["8K", "128K", "1M", "1000"]
    assert [size(n) for n in (12, 2048, 16 << 30)] == ["12 bytes", "2 KiB", "16 GiB"]


def test_models_lists_every_model() -> None:
    found = rows(call("models").stdout)
    assert [row[0] for row in found[1:]] == list(model_names())
    (llama,) = (row for row in found if row[0] == "llama3.1-8b")
    assert llama[1:6] == ["8.03B", "32", "32/8", "128K", "moba 4096 x 12, -3: full"]


def test_show_by_hand_for_one_model() -> None:
    # llama-tiny: 4 layers of which the last is full, 2 key heads of 32, blocks of 64, top 3.
    result = call("show", "llama-tiny", "--device", "cpu", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    found = rows(result.stdout)
    facts = {row[0]: row[1] for row in found if len(row) == 2}
    embedding, head = 2048 * 128, 2048 * 128
    layer = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384 + 2 * 128
    assert facts["parameters"] == count(embedding + head + 4 * layer + 128)
    assert facts["KV cache per token"] == f"{4 * 2 * 2 * 32 * 4} bytes in float32"
    assert facts["centroids per token"] == f"{3 * 2 * 32 * 4 / 64:.3g} bytes in float32"
    assert facts["KV cache at full context"] == "8 MiB"
    share = (3 * brute(MoBA(64, 3), 8192) + brute(Full(), 8192)) / (4 * brute(Full(), 8192))
    assert facts["keys read in a prefill of 8K"] == f"{100 * share:.3g} %"
    table = [row for row in found if len(row) == 9]
    assert table[1][:6] == ["0-2", "3", "moba", "64", "3", "full"]
    assert table[1][7:] == ["flash", "auto: reads chosen blocks only, no mask in memory"]
    assert table[2][:3] == ["3", "1", "full"]


def test_show_with_overrides_says_what_they_come_to() -> None:
    args = ("show", "llama-tiny", "attention[0].top_k=64", "attention[1].backend=sdpa", "--device", "cpu")
    table = [row for row in rows(call(*args).stdout) if len(row) == 9]
    dense = ["flash", "compiled for this processor"] if library() else ["sdpa", "no mask needed"]
    assert table[1][7:] == [dense[0], f"auto: its blocks cover the length, so full; dense, {dense[1]}"]
    assert table[2][7:] == ["sdpa", "named in the rules"]
    table = [row for row in rows(call("show", "llama-tiny", "attention[0].backend=sdpa").stdout) if len(row) == 9]
    assert "sdpa" in table[1][7]
    assert table[1][8] not in ("", "named in the rules")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["llama-tini"],
            "model 'llama-tini': no such file, and none of that name is shipped; did you mean 'llama-tiny'?",
        ),
        (["./mine.yaml"], "model './mine.yaml': no such file, and none of that name is shipped"),
        (["./nothing"], "./nothing: no such folder"),
        (["llama-tiny", "--dtype", "int8"], "--dtype: want one of float32, bfloat16, float16, got 'int8'"),
        (["llama-tiny", "--device", "toaster"], "--device: want auto, cpu or cuda, got 'toaster'"),
        (["llama-tiny", "attention[0].topk=3"], "unknown key 'topk'; did you mean 'top_k'?"),
    ],
)
def test_show_errors(args: list[str], message: str) -> None:
    result = call("show", *args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(("name", "package"), [("to-hf", RECIPES), ("llama/llama-tiny", MODELS)])
def test_copy_writes_the_file_as_it_is_and_never_over_another(name: str, package: str, tmp_path: Path) -> None:
    text = find(name, package).text
    assert call("copy", name, str(tmp_path), "--dry-run").exit_code == 0
    assert list(tmp_path.iterdir()) == []
    assert call("copy", name, str(tmp_path / "mine.yaml")).exit_code == 0
    assert (tmp_path / "mine.yaml").read_text() == text
    again = call("copy", name, str(tmp_path / "mine.yaml"))
    assert again.exit_code == 2
    assert "is there already; name another file or remove it" in again.stderr
    assert call("copy", name, str(tmp_path)).exit_code == 0
    assert (tmp_path / f"{name.split('/')[-1]}.yaml").read_text() == text


def test_a_copied_model_can_be_changed_and_shown(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    assert call("copy", "llama3.1-8b", str(mine)).exit_code == 0
    same = call("show", str(mine), "--device", "cpu")
    assert same.exit_code == 0, same.output
    assert rows(same.stdout) == rows(call("show", "llama3.1-8b", "--device", "cpu").stdout)
    mine.write_text(mine.read_text().replace("num_hidden_layers: 32", "num_hidden_layers: 8"))
    shown = call("show", str(mine), "attention[0].top_k=3", "--device", "cpu")
    assert "0-4\t5\tmoba\t4096\t3\tfull" in shown.stdout


def test_copy_errors(tmp_path: Path) -> None:
    assert "did you mean 'to-hf'?" in call("copy", "to-hff", str(tmp_path)).stderr
    assert "cannot be written: No such file or directory" in call("copy", "to-hf", str(tmp_path / "no" / "x")).stderr


def test_recipes_lists_every_recipe() -> None:
    assert [row[0] for row in rows(call("recipes").stdout)[1:]] == list(shipped(RECIPES))
