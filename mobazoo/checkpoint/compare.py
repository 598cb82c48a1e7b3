"""Whether a folder's tensors are those of a model, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel

from mobazoo.checkpoint.folder import Folder
from mobazoo.checkpoint.header import TensorInfo
from mobazoo.errors import InputError

# Names of torch dtypes that a weight may be stored in.
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Old Llama checkpoints store this; every model computes it.
_COMPUTED = "rotary_emb.inv_freq"
_SHOWN = 8


class CheckpointMismatchError(InputError):
    """Tensors that are not the model's; the attributes name all of them, the message the first of each kind."""

    def __init__(
        self,
        where: object,
        kind: str,
        missing: tuple[str, ...],
        unexpected: tuple[str, ...],
        misshaped: tuple[str, ...],
        mistyped: tuple[str, ...],
    ) -> None:
        self.missing, self.unexpected, self.misshaped, self.mistyped = missing, unexpected, misshaped, mistyped
        kinds = {"missing": missing, "unexpected": unexpected, "wrong shape": misshaped, "wrong dtype": mistyped}
        said = "; ".join(f"{len(names)} {word}: {_first(names)}" for word, names in kinds.items() if names)
        hint = ""
        if any(name.endswith("k_conv.weight") for name in missing):
            hint = "; kconv adds weights, which come by `mobazoo convert`"
        super().__init__(f"{where}: tensors do not fit its {kind} config: {said}{hint}")


def expected(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a model's checkpoint holds, a tied head included."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def is_computed(name: str) -> bool:
    """Whether a stored tensor is one that models compute themselves."""
    return name.endswith(_COMPUTED)


def check_fits(folder: Folder, model: PreTrainedModel) -> None:
    """Compares headers with a model on ``meta``.

    Raises:
        CheckpointMismatchError: tensors missing, unexpected, of the wrong shape, or not floating point.
    """
    want = expected(model)
    optional = {HEAD} if model.config.tie_word_embeddings else set()
    found = {name: info for name, info in folder.tensors.items() if not is_computed(name)}
    problems = (
        tuple(name for name in want if name not in found and name not in optional),
        tuple(name for name in found if name not in want),
        _misshaped(want, found),
        tuple(f"{name} is {info.dtype}" for name, info in folder.tensors.items() if info.dtype not in FLOATS),
    )
    if any(problems):
        raise CheckpointMismatchError(folder.path, model.config.model_type, *problems)


def _misshaped(want: Mapping[str, tuple[int, ...]], found: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    return tuple(
        f"{name} is {list(info.shape)}, want {list(want[name])}"
        for name, info in found.items()
        if name in want and info.shape != want[name]
    )


def _first(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
