"""`lsg-attn convert` for any family: its options, and one clear line and no file left when it fails."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
from family_recordings import FOLDER

from lsg_attn.cli.main import main
from lsg_attn.models import LSGBertForMaskedLM

BASE = FOLDER / "bert/base_512"
SIZES = ["--max-length", "600", "--block-size", "16", "--sparse-block-size", "16"]


def test_options(tmp_path, capsys):
    more = ["--architecture", "BertForMaskedLM", "--num-global-tokens", "3", "--no-use-token-ids"]
    main(["convert", str(BASE), str(tmp_path / "lsg"), *SIZES, *more])
    out = " ".join(capsys.readouterr().out.split())
    assert "up to 600 tokens" in out
    assert "Global tokens after the first are untrained" in out
    config = LSGBertForMaskedLM.from_pretrained(tmp_path / "lsg").config
    assert (config.num_global_tokens, config.max_position_embeddings) == (3, 600)
    main(["convert", str(tmp_path / "lsg"), str(tmp_path / "again"), "--max-length", "700", "--no-resize-lsg"])
    assert json.loads((tmp_path / "again/config.json").read_text())["max_position_embeddings"] == 700


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--architecture", "BertForEverything"], "expected one of BertModel"),
        (["--pass-global-tokens-to-decoder"], "got pass_global_tokens_to_decoder"),
        (["--mask-first-token", "--no-pool-with-global"], "pool_with_global: expected True"),
    ],
)
def test_bad_options_end_in_one_line(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(BASE), str(tmp_path / "lsg"), *SIZES, *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("lsg-attn: ")
    assert error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_in_one_line(tmp_path):
    """Files may have 20 kB, as if the disk were full."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(
        [sys.executable, "-m", "lsg_attn.cli.main", "convert", str(BASE), str(tmp_path / "lsg"), *SIZES],
        capture_output=True, text=True, preexec_fn=limit, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("lsg-attn: ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_sigterm_leaves_nothing(tmp_path):
    """A model of 3,000,000 positions takes a while to write."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lsg_attn.cli.main", "convert", BASE, tmp_path / "lsg", "--max-length=3000000"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not any(tmp_path.iterdir()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
