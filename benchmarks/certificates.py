"""What certified posteriors are worth: ``make certificates``, or ``python benchmarks/certificates.py NAME ...``.

For each model, a guide is trained for a short while, new datapoints get certified posteriors, and their means and
standard deviations are compared with the truth: exact, by quadrature, or by 40000 weighted draws where the posterior is
log-concave; NUTS checks it at some datapoints. Right is a mean within 0.1 standard deviations and a standard deviation
within 10 %, in every dimension; grossly wrong is three times that in any. Costs are evaluations of the log-joint for
each datapoint, and gradients of Pyro's NUTS (``--nuts N``, of so many datapoints) at its usual 4 chains of 1000 steps
of warm-up and 1000 draws.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import pyro
import torch
from certified_cases import CASES, Case, Moments
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from torch import Tensor

from pyro_amortized import AmortizedGuide, CertifiedPosterior, certified_posterior
from pyro_amortized.diagnostics.certificates.stages import STAGES
from pyro_amortized.diagnostics.evidence.evidence import log_weights_at
from pyro_amortized.diagnostics.evidence.proposal import Proposal
from pyro_amortized.diagnostics.optimum.laplace import covariance_root, find_modes, hessian
from pyro_amortized.diagnostics.problem import bind

WEIGHTED = 40_000
"""Weighted draws that stand for the truth of log-concave posteriors."""


def train(case: Case, num_steps: int, overconfident: float) -> AmortizedGuide:
    """A guide of the case, trained for a short while; its scales may be made too small afterwards."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AmortizedGuide(case.model)
    x = case.simulate(2000, 1)
    guide.setup(x)
    svi = SVI(case.model, guide, pyro.optim.Adam({"lr": 5e-3}), Trace_ELBO())
    for step in range(num_steps):
        svi.step(x[torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[:200]])
    if overconfident != 1.0:
        with torch.no_grad():
            last = [p for name, p in guide.named_parameters() if name.endswith("bias")][-1]
            last[len(last) // 2 :] += float(np.log(overconfident))
    return guide.eval()


def by_weights(case: Case, guide: AmortizedGuide, x: Tensor) -> Moments:
    """Moments of log-concave posteriors by importance samples of a multivariate t at the mode."""
    problem = bind(case.model, guide, (x,), None, 0)
    log_joint, rows, rng = problem.objective.log_joint, torch.arange(len(x)), torch.Generator().manual_seed(4)
    start = torch.zeros(1, len(x), problem.objective.family.latent_dim)
    loc = find_modes(log_joint, start, torch.eye(start.shape[-1]).expand(len(x), -1, -1), problem.phi)[0][0]
    root = covariance_root(hessian(log_joint.plain, loc, problem.phi), torch.eye(loc.shape[-1]).expand(len(x), -1, -1))
    parts = torch.full((1, len(x)), 250, dtype=torch.long), torch.full((1, len(x)), 10.0)
    q = Proposal(loc.unsqueeze(0), root.unsqueeze(0), *parts)
    draws = [q.sample(4000, rng) for _ in range(WEIGHTED // 4000)]
    weights = torch.cat([log_weights_at(problem, q, rows, z) for z in draws]).softmax(0)
    z = torch.cat(draws)
    mean = torch.einsum("kn,knd->nd", weights, z)
    return mean, torch.einsum("kn,knd->nd", weights, (z - mean).square()).sqrt()


def run_nuts(case: Case, x: Tensor) -> tuple[float, Moments]:
    """Gradients that Pyro's NUTS takes for one datapoint, the mean over those given, and their posteriors' moments."""
    count, means, scales = 0, [], []
    names = [name for name, _ in poutine.trace(case.model).get_trace(x[:1]).iter_stochastic_nodes()]

    def counted(value: Tensor) -> None:
        nonlocal count
        count += 1
        case.model(value)

    for value in x:
        mcmc = MCMC(NUTS(counted, ignore_jit_warnings=True), num_samples=1000, warmup_steps=1000, disable_progbar=True)
        mcmc.run(value.unsqueeze(0))
        samples = mcmc.get_samples()
        draws = torch.cat([samples[name].reshape(1000, -1) for name in names if name in samples], -1)
        means.append(draws.mean(0))
        scales.append(draws.std(0))
    return 4 * count / len(x), (torch.stack(means), torch.stack(scales))


def errors(found: CertifiedPosterior, truth: Moments) -> np.ndarray[Any, Any]:
    """The larger of a datapoint's worst errors, of means in 0.1 sd and of sds in 10 %; right is up to 1, ``(N,)``."""
    draws = found.draws.double()
    mean, scale = truth
    shift = (draws.mean(0) - mean).abs() / scale / 0.1
    ratio = (draws.std(0) / scale - 1).abs() / 0.1
    return torch.maximum(shift, ratio).amax(-1).numpy()


def row(name: str, found: CertifiedPosterior, error: np.ndarray[Any, Any], nuts: float, seconds: float) -> str:
    """One row of the table."""
    data = found.dataset
    certified = data["certified"].values
    shares = [float((certified & (data["stage"].values == stage)).mean()) for stage in STAGES]
    local = float(data["local"].mean())
    cells = "".join(f"{share:10.1%}" for share in (*shares, local, 1 - sum(shares) - local))
    right = (
        f"{(error[certified] <= 1).mean():8.1%}{(error[certified] > 3).mean():8.1%}"
        if certified.any()
        else f"{'-':>8s}{'-':>8s}"
    )
    others = f"{(error[~certified] <= 1).mean():8.1%}" if (~certified).any() else f"{'-':>8s}"
    gradients, values = float(data["num_gradients"].mean()), float(data["num_evaluations"].mean())
    cost = f"{gradients:11.0f}{values:11.0f}{nuts:10.0f}{(gradients + values) / nuts:8.1%}"
    return f"{name:34s}{cells}{right}{others}{cost}{seconds:8.0f}"


def main() -> None:
    """Runs the cases named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"some of {list(CASES)}")
    parser.add_argument("--num-datapoints", type=int, default=500)
    parser.add_argument("--num-samples", type=int, default=4000)
    parser.add_argument("--num-steps", type=int, default=1500, help="training steps of the guide")
    parser.add_argument("--nuts", type=int, default=2, help="datapoints for which NUTS is run (default: %(default)s)")
    parser.add_argument("--overconfident", type=float, default=1.0, help="factor on the guide's scales after training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    columns = (*STAGES, "local", "neither")
    print(
        f"{args.num_datapoints} datapoints, {args.num_samples} draws\n{'':34s}"
        + "".join(f"{name:>10s}" for name in columns)
        + "".join(f"{name:>8s}" for name in ("right", "gross", "others"))
        + f"{'gradients':>11s}{'values':>11s}{'NUTS':>10s}{'cost':>8s}{'seconds':>8s}"
    )
    for name in args.names or CASES:
        case = CASES[name]()
        guide = train(case, args.num_steps, args.overconfident)
        x = case.simulate(args.num_datapoints, 2 + args.seed)
        start = time.perf_counter()
        found = certified_posterior(case.model, guide, (x,), num_samples=args.num_samples, seed=args.seed)
        seconds = time.perf_counter() - start
        truth = by_weights(case, guide, x) if case.truth is None else case.truth(x)
        nuts = float("nan")
        if args.nuts:
            nuts, (mean, scale) = run_nuts(case, x[: args.nuts])
            shift = ((mean - truth[0][: args.nuts]) / truth[1][: args.nuts]).abs().max()
            ratio = (scale / truth[1][: args.nuts] - 1).abs().max()
            print(f"    NUTS and the truth differ by up to {shift:.2f} sd in means and {ratio:.0%} in sds")
        print(row(case.name, found, errors(found, truth), nuts, seconds), flush=True)


if __name__ == "__main__":
    main()
