"""What an install with torch and numpy alone must do: the README's snippets, and every command.

    python tests/bare_install.py README.md       in such an environment, outside of the repository
"""

import contextlib
import io
import re
import sys
from pathlib import Path

import torch

EXTRA = r"^rlsd: {} needs the package [\w-]+: pip install 'rlsd\[train\]'\.\n$"
COMMANDS = {  # arguments: (exit status, what the end of the output or the whole error is)
    "--help": (0, "rlsd doctor"),
    "--version": (0, r"^\d"),
    "doctor": (0, "transformers +missing"),
    "validate": (0, "All within the contract"),
    "bench --rows 16 --hidden_size 8 --vocab_size 64 --rounds 1 --live .5": (0, "impl='torch'"),
    "train --help": (0, "--rlsd_lambda 0.5"),
    "train": (2, EXTRA.format("train")),
    "train --config x.yaml --max_steps 3": (2, EXTRA.format("train")),
    "train --resume_from_checkpoint .": (2, EXTRA.format("train")),
    "eval some/model --train_dataset x.jsonl": (2, EXTRA.format("eval")),
    "plot .": (2, EXTRA.format("plot")),
    "compare --config x.yaml": (2, EXTRA.format("compare")),
}


def snippets(readme, language="python"):
    """The texts of the README's blocks in a language."""
    blocks = re.findall(r"```(\w*)\n(.*?)```", readme, flags=re.DOTALL)
    return [text for name, text in blocks if name == language]


def snippets_agree(readme):
    """Run the two Python snippets on made-up inputs: the fused loss and the PyTorch it equals."""
    use, equal = snippets(readme)
    batch, length, hidden_size, vocab = 2, 3, 8, 17
    torch.manual_seed(0)
    scope = {
        "hidden": torch.randn(batch, length, hidden_size, requires_grad=True),
        "teacher_hidden": torch.randn(batch, length, hidden_size),
        "lm_head": torch.nn.Linear(hidden_size, vocab, bias=False),
        "completion_ids": torch.randint(0, vocab, (batch, length)),
        "advantages": torch.tensor([0.7, -0.7]), "mask": torch.ones(batch, length),
        "old_log_probs": -3 + 0.1 * torch.randn(batch, length),
    }
    exec(use, scope)
    plain = dict(scope)
    exec(equal, plain)
    assert (plain["rho"][scope["advantages"] < 0] < 3).all()
    torch.testing.assert_close(scope["out"].loss, plain["loss"])


def wrong_commands():
    """What the commands say other than COMMANDS, as texts."""
    from rlsd.cli import main

    wrong = []
    for text, (status, pattern) in COMMANDS.items():
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            got = main(text.split())
        said = err.getvalue() if status else out.getvalue()
        if got != status or not re.search(pattern, said):
            wrong.append(f"rlsd {text}: exit status {got}\n{out.getvalue()}{err.getvalue()}")
    return wrong


if __name__ == "__main__":
    torch.set_num_threads(1)
    snippets_agree(Path(sys.argv[1]).read_text(encoding="utf-8"))
    failures = wrong_commands()
    print(*failures, sep="\n")
    print(f"{len(COMMANDS)} commands, {len(failures)} wrong; the snippets agree")
    sys.exit(bool(failures))
