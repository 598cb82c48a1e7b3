"""Kernel providers: that calls have the shape each release takes, and which one is chosen."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from mobazoo.attention.kernels import providers, varlen
from mobazoo.attention.kernels.fit import Fitted, Provider
from mobazoo.attention.kernels.layout import Layout
from mobazoo.attention.kernels.sequences import Sequences
from mobazoo.errors import InputError, UnsupportedError
from tests.attention import fake_flash_attn
from tests.attention.test_varlen import Case, routes_of, segments_of, tensors_of
from tests.attention.varlen_stub import Stub

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = (
    Case("padded", dim=12),
    Case("packed", queries=1, heads=(8, 1)),
    Case("padded", strides="tokens", block_size=0),
)
RELEASES = {"2.6": fake_flash_attn.release_2_6, "2.8": fake_flash_attn.release_2_8}


def run(case: Case, provider: Provider) -> tuple[Tensor, ...]:
    q, k, v, dout = (x.bfloat16() for x in tensors_of(case))
    segments = segments_of(case.rows)
    layout = Layout.of(segments, routes_of(case, q, k, segments), case.q_start)
    out, lse = varlen.forward(q, k, v, layout, 0.3, provider)
    return out, lse, *varlen.backward(dout, q, k, v, out, lse, layout, 0.3, provider)


def check(case: Case, provider: Provider) -> None:
    for got, want in zip(run(case, provider), run(case, Fitted(Stub())), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_wheel(release: str, case: Case) -> None:
    check(case, Fitted(providers.Wheel(RELEASES[release]())))


@pytest.fixture
def aten_on_cpu() -> Iterator[None]:
    """Kernels for PyTorch's real operators, so that calls go through their schemas."""

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None):
        assert (dropout_p, return_debug_mask) == (0.0, False)
        out, lse = fake_flash_attn.attend(q, k, v, Sequences(cu_q, cu_k, max_q, max_k, is_causal), scale)
        return out, lse, torch.empty(2, dtype=torch.uint64), torch.empty(0, dtype=torch.uint64), torch.empty(0)

    def backward(
        dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, rng_state, unused, *, scale=None
    ):
        assert dropout_p == 0.0
        assert rng_state.dtype == torch.uint64
        runs = Sequences(cu_q, cu_k, max_q, max_k, is_causal)
        return fake_flash_attn.differentiate(dout, q, k, v, out, lse, runs, scale)

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield


@pytest.mark.usefixtures("aten_on_cpu")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_aten(case: Case) -> None:
    check(case, Fitted(providers.Aten()))


def test_wheel_of_an_unknown_release() -> None:
    module = fake_flash_attn.release_2_6()
    module._flash_attn_varlen_forward = lambda *args: (args[0],) * 5
    with pytest.raises(UnsupportedError, match=r"returns 5 values .* flash-attn>=2.6,<3"):
        run(Case(), Fitted(providers.Wheel(module)))


def test_wheel_that_pads_by_sequence() -> None:
    """Before 2.6 the log-sum-exp was ``[runs, H, max_q]``."""
    module = fake_flash_attn.release_2_8()
    module._flash_attn_varlen_forward = lambda q, *args: (q, q.new_empty(args[2].shape[0] - 1, 4, 7), None, None)
    with pytest.raises(UnsupportedError, match=r"log-sum-exp of \[\d+, 4, 7\], want .* before 2.6"):
        run(Case(), Fitted(providers.Wheel(module)))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As on a GPU with both providers; nothing that a test loads outlives it."""
    monkeypatch.setattr(providers, "_HAS_ATEN", True)
    monkeypatch.setattr(providers, "_HAS_WHEEL", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    package = ModuleType("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, fake_flash_attn.NAME, fake_flash_attn.release_2_8())
    providers._load_wheel.cache_clear()
    yield monkeypatch
    providers._load_wheel.cache_clear()


ABLE = ("cuda", torch.bfloat16, 128)


def kernel_of(provider: Provider) -> type:
    assert isinstance(provider, Fitted)
    return type(provider.inner)


def test_wheel_comes_first(installed: pytest.MonkeyPatch) -> None:
    assert providers.choose(*ABLE) == ("wheel", "wheel is there")
    assert kernel_of(providers.get("auto", *ABLE)) is providers.Wheel
    assert kernel_of(providers.get("wheel", *ABLE)) is providers.Wheel
    assert kernel_of(providers.get("aten", *ABLE)) is providers.Aten


def test_without_the_wheel(installed: pytest.MonkeyPatch) -> None:
    installed.setattr(providers, "_HAS_WHEEL", False)
    name, why = providers.choose(*ABLE)
    assert name == "aten"
    assert "mobazoo[flash]" in why
    assert kernel_of(providers.get("auto", *ABLE)) is providers.Aten
    with pytest.raises(UnsupportedError, match=r"not installed \(install mobazoo\[flash\]\)"):
        providers.get("wheel", *ABLE)


def test_wheel_that_does_not_import(installed: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    installed.setitem(sys.modules, fake_flash_attn.NAME, None)
    name, why = providers.choose(*ABLE)
    assert name == "aten"
    assert "installed but does not import" in why
    assert "rebuild it for this PyTorch" in caplog.text
    with pytest.raises(UnsupportedError, match="does not import"):
        providers.get("wheel", *ABLE)


def test_nothing_there(installed: pytest.MonkeyPatch) -> None:
    installed.setattr(providers, "_HAS_WHEEL", False)
    installed.setattr(providers, "_HAS_ATEN", False)
    assert providers.choose(*ABLE)[0] is None
    with pytest.raises(UnsupportedError, match=r"flash: no kernel provider: .*CUDA flash kernels .*mobazoo\[flash\]"):
        providers.get("auto", *ABLE)
    with pytest.raises(UnsupportedError, match="aten: this PyTorch was built without"):
        providers.get("aten", *ABLE)


def test_a_provider_that_is_none() -> None:
    with pytest.raises(InputError, match="flash: unknown provider 'wheels'; known: auto, "):
        providers.get("wheels", *ABLE)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "reason"),
    [
        ("mps", torch.float16, 64, "no kernel for mps"),
        ("cuda", torch.float32, 64, "float16 and bfloat16 only, got torch.float32"),
        ("cuda", torch.bfloat16, 257, "head dims up to 256, got 257"),
    ],
)
@pytest.mark.usefixtures("installed")
def test_what_no_kernel_does(device: str, dtype: torch.dtype, head_dim: int, reason: str) -> None:
    assert reason in (providers.unsupported(device, dtype, head_dim) or "")
    for name in ("auto", "aten"):
        with pytest.raises(UnsupportedError, match=reason):
            providers.get(name, device, dtype, head_dim)


def test_old_gpu(installed: pytest.MonkeyPatch) -> None:
    installed.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert "compute capability 8.0" in (providers.unsupported(*ABLE) or "")


def test_unknown_name() -> None:
    with pytest.raises(InputError, match="unknown provider 'cudnn'; known: auto, wheel, aten"):
        providers.get("cudnn", *ABLE)


@pytest.mark.usefixtures("installed")
def test_the_check_can_be_traced() -> None:
    """A model that is compiled whole asks before it attends."""

    def ask(x: Tensor) -> Tensor:
        return x + 1 if providers.unsupported("cuda", torch.bfloat16, 64) is None else x

    compiled = torch.compile(ask, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())) == 1
