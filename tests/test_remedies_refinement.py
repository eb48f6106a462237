"""What errors about refinement advise: of update rules, estimators and starts."""

import pyro.distributions as dist
import pytest
import torch
from pyro.infer import JitTrace_ELBO
from remedies import Cases, made, model, of_latent, train

from pyro_amortized import (
    Adam,
    IterativeAmortizedGuide,
    LearnedUpdate,
    MLPEncoder,
    NaturalGradient,
    Newton,
    SemiAmortizedGuide,
)

case = Cases()

MIXTURE = {"family": "mixture", "num_steps": 2}
case(
    "NaturalGradient of a mixture",
    lambda: train(guide_class=SemiAmortizedGuide, update=NaturalGradient(0.5), **MIXTURE),
    r"update=Adam\(0.05\)",
    lambda: train(guide_class=SemiAmortizedGuide, update=Adam(0.05), **MIXTURE),
)
case(
    "Newton of a mixture",
    lambda: train(guide_class=SemiAmortizedGuide, update=Newton(), num_particles=8, **MIXTURE),
    r"update=Adam\(0.05\)",
    lambda: train(guide_class=SemiAmortizedGuide, update=Adam(0.05), **MIXTURE),
)
case(
    "Newton of one particle",
    lambda: train(guide_class=SemiAmortizedGuide, update=Newton(), num_steps=2, num_particles=1),
    "num_particles=32",
    lambda: train(guide_class=SemiAmortizedGuide, update=Newton(), num_steps=2, num_particles=32),
)
case(
    "Newton of one particle, natural",
    lambda: train(guide_class=SemiAmortizedGuide, update=Newton(), num_steps=2, num_particles=1),
    r"NaturalGradient\(0.5\)",
    lambda: train(guide_class=SemiAmortizedGuide, update=NaturalGradient(0.5), num_steps=2),
)
case(
    "an update that is none",
    lambda: SemiAmortizedGuide(model, update=torch.optim.Adam),
    r"NaturalGradient\(0.5\) or pyro_amortized.Adam\(0.05\)",
    lambda: [train(guide_class=SemiAmortizedGuide, update=u, num_steps=2) for u in (NaturalGradient(0.5), Adam(0.05))],
)
case(
    "a learned update in SemiAmortizedGuide",
    lambda: SemiAmortizedGuide(model, update=LearnedUpdate()),
    "IterativeAmortizedGuide",
    lambda: train(guide_class=IterativeAmortizedGuide, update=LearnedUpdate((8,)), num_steps=2),
)
case(
    "a given update in IterativeAmortizedGuide",
    lambda: IterativeAmortizedGuide(model, update=Adam(0.05)),
    r"update=LearnedUpdate\(\)",
    lambda: train(guide_class=IterativeAmortizedGuide, update=LearnedUpdate((8,)), num_steps=2),
)


def learned_twice(again: bool) -> None:
    update = LearnedUpdate((8,))
    train(guide_class=IterativeAmortizedGuide, update=update, num_steps=2)
    update = LearnedUpdate((8,)) if again else update
    train(
        of_latent(lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1)),
        IterativeAmortizedGuide,
        update=update,
        num_steps=2,
    )


case(
    "a learned update of two guides",
    lambda: learned_twice(False),
    "a new LearnedUpdate for each guide",
    lambda: learned_twice(True),
)
case(
    "a learned step size",
    lambda: SemiAmortizedGuide(model, update=Adam(0.05, learned=True), encoder_gradient="first_order"),
    'encoder_gradient="unrolled"',
    lambda: train(guide_class=SemiAmortizedGuide, update=Adam(0.05, learned=True), num_steps=2),
)
case(
    "an encoder and the prior",
    lambda: SemiAmortizedGuide(model, MLPEncoder(1), initial="prior"),
    "leaving one of them out",
    lambda: [
        train(model, SemiAmortizedGuide, MLPEncoder(1), num_steps=2),
        train(guide_class=SemiAmortizedGuide, initial="prior", num_steps=2),
    ],
)
case(
    "an unknown start",
    lambda: SemiAmortizedGuide(model, initial="foo"),
    'initial="encoder" or initial="prior"',
    lambda: SemiAmortizedGuide(model, initial="prior"),
)
case(
    "a closed form of a mixture",
    lambda: train(guide_class=SemiAmortizedGuide, estimator="analytic_kl", **MIXTURE),
    'estimator="stl"',
    lambda: train(guide_class=SemiAmortizedGuide, estimator="stl", **MIXTURE),
)
case(
    "refinement in JitTrace_ELBO",
    lambda: train(guide_class=SemiAmortizedGuide, num_steps=2, elbo=JitTrace_ELBO(ignore_jit_warnings=True)),
    "Trace_ELBO, and compile=True",
    lambda: train(guide_class=SemiAmortizedGuide, num_steps=2),
)
case(
    "an unknown estimator",
    lambda: made(model, SemiAmortizedGuide, estimator="nothing"),
    "'",
    lambda: made(model, SemiAmortizedGuide),
)
case(
    "an unknown gradient of the encoder",
    lambda: made(model, SemiAmortizedGuide, encoder_gradient="nothing"),
    '"anchored"',
    lambda: made(model, SemiAmortizedGuide, encoder_gradient="anchored"),
)
case(
    "a step to the optimum already",
    lambda: Newton(step_size=1.5),
    "0.7",
    lambda: Newton(step_size=0.7),
)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", case)
def test_the_remedy_helps(name: str) -> None:
    case.check(name)
