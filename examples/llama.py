"""A stock Hugging Face model with MoBA attention: the flags of the original repository's example.

python examples/llama.py --model meta-llama/Llama-3.1-8B --moba-chunk-size 4096 --moba-topk 12 --attn moba
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import mobazoo


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="meta-llama/Llama-3.1-8B", help="folder or Hub id of a Llama or Qwen model")
    parser.add_argument("--moba-chunk-size", type=int, default=4096, help="tokens in a block")
    parser.add_argument("--moba-topk", type=int, default=12, help="blocks a query reads, its own included")
    parser.add_argument(
        "--attn", choices=["moba", "moba_naive"], default="moba", help="moba_naive is the slow reference"
    )
    parser.add_argument("--prompt", default="how are you?")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> str:
    options = parse(arguments)
    mobazoo.register()
    config = AutoConfig.from_pretrained(options.model)
    rule = {"layers": ":", "pattern": "moba", "block_size": options.moba_chunk_size, "top_k": options.moba_topk}
    config.moba = {"attention": [rule]}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        options.model,
        config=config,
        dtype=torch.bfloat16 if device == "cuda" else torch.float32,
        attn_implementation=options.attn,
        use_safetensors=True,
    ).to(device)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    inputs = tokenizer(options.prompt, return_tensors="pt").to(device)
    tokens = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False)
    text = tokenizer.decode(tokens[0], skip_special_tokens=True)
    print(text)
    return text


if __name__ == "__main__":
    main()
