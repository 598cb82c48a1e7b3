"""Registration with transformers, and a package that is light until then."""

from __future__ import annotations

import subprocess
import sys

import pytest
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import mobazoo
from mobazoo.integrations.transformers import moba_attention, moba_mask, moba_naive_attention
from mobazoo.zoo import families, family_class


def test_names_and_more_than_once() -> None:
    for _ in range(3):
        mobazoo.register()
    assert AttentionInterface()["moba"] is moba_attention
    assert AttentionInterface()["moba_naive"] is moba_naive_attention
    assert AttentionMaskInterface()["moba"] is AttentionMaskInterface()["moba_naive"] is moba_mask
    assert set(families()) == {"llama", "qwen2", "qwen3"}
    for family in families():
        config = AutoConfig.for_model(f"moba_{family}")
        assert type(config) is family_class(family, "Config")
        assert AutoModelForCausalLM._model_mapping[type(config)] is family_class(family, "ForCausalLM")


def test_the_package_is_light() -> None:
    code = (
        "import sys, mobazoo; light = [m for m in ('torch', 'transformers', 'omegaconf') if m in sys.modules];"
        "mobazoo.register(); print(light, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"


def test_unknown_attributes() -> None:
    with pytest.raises(AttributeError, match="module 'mobazoo' has no attribute 'registr'"):
        _ = mobazoo.registr
