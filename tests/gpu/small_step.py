"""One small step of every implementation and feature, for `sanitize.sh`; prints what it ran."""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from on_gpu import DEVICE, DTYPES, KERNELS, OPTIONS, problem  # noqa: E402
from problems import NAMES, make_problem, run_fused  # noqa: E402

from rlsd_kernels import available_impls, linear_log_probs  # noqa: E402
from rlsd_kernels.logprob import load_impl  # noqa: E402


def main():
    for impl in KERNELS:
        for dtype in DTYPES:
            status = available_impls(torch.empty(0, dtype=dtype, device=DEVICE))[impl]
            if status != "ok":
                print(f"{impl} {NAMES[dtype]}: not run: {status}")
                continue
            for options in OPTIONS:
                # Rows that are padded in the chunk, whole tiles and a tail, two groups.
                p, call = problem(options, 37, 4099, 33, dtype)
                if DEVICE == "cuda":
                    p["completion_ids"][5] = 4099
                    p["completion_ids"][6] = -1
                run_fused(p, impl, max_workspace_bytes=20 * 8 * 4099, **call)
            p = make_problem(37, 4099, 33, dtype, device=DEVICE)
            leaves = [p[k].requires_grad_() for k in ("hidden", "weight")]
            lp, entropy = linear_log_probs(
                *leaves, p["completion_ids"], old_log_probs=p["old_log_probs"] - 200,
                return_entropy=True, impl=impl,
            )
            (lp.sum() + entropy.sum()).backward()
            ids = torch.stack([p["completion_ids"], p["completion_ids"].flip(0)], 1)
            out = linear_log_probs(
                *leaves, ids, return_entropy=True, return_lse=True, return_mean_logits=True,
                return_greedy=True, final_logit_softcapping=3.0, impl=impl,
            )
            sum(x.sum() for x in out[:4]).backward()
            if impl == "triton" and dtype != torch.float32:  # the GEMM with the exp inside
                p = make_problem(150, 4112, 128, dtype, device=DEVICE)
                scorer = load_impl(impl).Scorer(p["weight"], None, 1.0, 1.0, None, 150, tier="B")
                out = torch.empty(150, 4112, dtype=dtype, device=DEVICE)
                scorer.score(p["hidden"], torch.full((150,), 12.0, device=DEVICE), out=out,
                             keep="exp")
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            print(f"{impl} {NAMES[dtype]}: ran")


if __name__ == "__main__":
    main()
