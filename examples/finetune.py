"""Fine-tune an LSG-BART on documents and their summaries with transformers' Seq2SeqTrainer.

    lsg-attn convert facebook/bart-base lsg-bart-4096 --max-length 4096
    python examples/finetune.py data.jsonl --model lsg-bart-4096 --output my-summarizer

Each line of the data is a JSON object with the strings "document" and "summary". The Trainer requires accelerate:
`pip install accelerate`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pairs import read_pairs
from torch.utils.data import Dataset
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq, Seq2SeqTrainer
from transformers import Seq2SeqTrainingArguments as Arguments

from lsg_attn.bart import LSGBartConfig


class Summaries(Dataset[dict[str, Any]]):
    """The examples of a JSON-lines file. Each one is tokenized when it is read.

    Raises:
        OSError, UnicodeDecodeError, ValueError: as in :func:`pairs.read_pairs`.
    """

    def __init__(self, path: Path, tokenizer: Any, max_length: int, max_target_length: int) -> None:
        self.tokenizer, self.max_length, self.max_target_length = tokenizer, max_length, max_target_length
        self.pairs = read_pairs(path)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        document, summary = self.pairs[index]
        inputs = self.tokenizer(document, truncation=True, max_length=self.max_length)
        target = self.tokenizer(text_target=summary, truncation=True, max_length=self.max_target_length)
        return {**inputs, "labels": target["input_ids"]}


def main() -> None:
    """Train the model and save it."""
    parser = argparse.ArgumentParser(description="Fine-tune an LSG-BART to summarize.")
    parser.add_argument("data", type=Path, help='JSON lines with "document" and "summary"')
    parser.add_argument("--model", required=True, help="name or folder of an LSG-BART")
    parser.add_argument("--output", required=True, help="folder for the trained model")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--max-target-length", type=int, default=256)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory for about a third more time")
    parser.add_argument("--bf16", action="store_true", help="mixed precision, on GPUs that support bfloat16")
    options = parser.parse_args()

    model = AutoModelForSeq2SeqLM.from_pretrained(options.model, use_safetensors=True)
    if not isinstance(model.config, LSGBartConfig):
        parser.error(f"--model: expected an LSG-BART, got {options.model}; `lsg-attn convert` converts a BART")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    try:
        data = Summaries(options.data, tokenizer, model.config.max_position_embeddings, options.max_target_length)
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"expected a text file in UTF-8 at {options.data}: {error}")
    except ValueError as error:
        parser.error(str(error))
    trainer = Seq2SeqTrainer(
        model=model,
        args=Arguments(
            output_dir=options.output,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            gradient_checkpointing=options.gradient_checkpointing,
            bf16=options.bf16,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
    )
    trainer.train()
    trainer.save_model(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
