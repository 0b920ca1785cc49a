"""Summarize a long text file with an LSG-BART, or with a plain BART, which is converted first.

    python examples/summarize.py book.txt --model ccdv/lsg-bart-base-4096-arxiv

The document is read in one piece, up to the model's length. If the document is longer, the output says so.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from lsg_attn.bart import LSGBartConfig, convert


def load(path: str, max_length: int | None) -> tuple[Any, Any]:
    """Load a model and its tokenizer. A plain BART is converted for ``max_length`` tokens."""
    if isinstance(AutoConfig.from_pretrained(path), LSGBartConfig):
        return AutoModelForSeq2SeqLM.from_pretrained(path, use_safetensors=True), AutoTokenizer.from_pretrained(path)
    print(f"{path} is a plain BART: converting it for {max_length or 4096} tokens (not fine-tuned for that length)")
    return convert(path, max_length or 4096)


def now(device: str) -> float:
    """The time in seconds, after the device has finished its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    """Read the file, summarize it, and print the summary and the speed."""
    parser = argparse.ArgumentParser(description="Summarize a long text file.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", required=True, help="name or folder of an LSG-BART or BART")
    parser.add_argument("--max-length", type=int, help="how many tokens to read (default: as many as the model can)")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--num-beams", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    try:
        text = options.file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"expected a text file in UTF-8 at {options.file}: {error}")
    model, tokenizer = load(options.model, options.max_length)
    model = model.to(options.device, torch.float32 if options.device == "cpu" else torch.bfloat16).eval()
    limit = model.config.max_position_embeddings
    if options.max_length is not None and options.max_length > limit:
        parser.error(f"--max-length: expected at most {limit}, the length of {options.model}, got {options.max_length}")
    inputs = tokenizer(text, truncation=True, max_length=options.max_length or limit, return_tensors="pt")
    num_tokens, total = inputs["input_ids"].shape[1], len(tokenizer(text, verbose=False)["input_ids"])
    print(f"reading {num_tokens} of {total} tokens" + (", the rest is left out" if num_tokens < total else ""))

    inputs = {name: inputs[name].to(options.device) for name in ("input_ids", "attention_mask")}
    times = [now(options.device)]
    with torch.inference_mode():
        states = model.get_encoder()(**inputs, return_dict=True)
        times.append(now(options.device))
        (summary,) = model.generate(
            encoder_outputs=states,
            attention_mask=inputs["attention_mask"],
            max_new_tokens=options.max_new_tokens,
            num_beams=options.num_beams,
        )
        times.append(now(options.device))
    new_tokens = len(summary) - 1  # without the decoder's start token
    print(f"\n{tokenizer.decode(summary, skip_special_tokens=True)}\n")
    encoding, generating = times[1] - times[0], times[2] - times[1]
    print(
        f"read at {num_tokens / encoding:.0f} tokens/s, "
        f"wrote {new_tokens} tokens at {new_tokens / generating:.1f} tokens/s"
    )


if __name__ == "__main__":
    main()
