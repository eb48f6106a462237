"""What errors about what a guide holds advise: of its global guide, its table, its state and its model."""

import pickle
from typing import Any

import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from remedies import Cases, X, global_only, made, masked_global, model, step, subsampled, train

from pyro_amortized import AmortizedGuide, MLPEncoder, PerDatapointGuide, SemiAmortizedGuide

case = Cases()


def loaded() -> Any:
    pyro.clear_param_store()
    return pickle.loads(pickle.dumps(made()))  # noqa: S301 - of its own making


def loaded_with_model() -> None:
    guide = loaded()
    guide.model = model
    guide.median(X)
    guide.refined(2).median(X)


case(
    "phi of a model without local latents",
    lambda: made(global_only).variational_parameters(X),
    "guide.global_median",
    lambda: made(global_only).global_median(X),
)
case(
    "posterior of a model without local latents",
    lambda: made(global_only).posterior(X),
    "guide.quantiles",
    lambda: made(global_only).quantiles([0.1], X),
)
case(
    "refined before setup",
    lambda: AmortizedGuide(model).refined(2),
    r"guide.setup\(...\)",
    lambda: made().refined(2).median(X),
)
case(
    "refined without local latents",
    lambda: made(global_only).refined(2),
    "this guide as it is",
    lambda: made(global_only).median(X),
)
case(
    "refined with another family",
    lambda: made().refined(2, family="normal"),
    "a new SemiAmortizedGuide",
    lambda: train(guide_class=SemiAmortizedGuide, num_steps=2, family="normal"),
)
case("loaded without its model", lambda: loaded().refined(2), "`guide.model = model`", loaded_with_model)
case(
    "a table and new data",
    lambda: made(guide_class=PerDatapointGuide).median(X[:3]),
    "AmortizedGuide",
    lambda: made().median(X[:3]),
)


def table_of_all() -> None:
    guide = PerDatapointGuide(subsampled)
    step(subsampled, guide, X, torch.arange(6))
    step(subsampled, guide, X, torch.tensor([1, 3]))


case(
    "a table and a batch",
    lambda: made(guide_class=PerDatapointGuide).median(X[:3]),
    r"pyro.plate\(name, full_size, subsample=indices\)",
    table_of_all,
)
case(
    "a table with an encoder input",
    lambda: PerDatapointGuide(model, encoder_input="x"),
    "AmortizedGuide",
    lambda: train(encoder_input="x"),
)
case(
    "a joint global guide of masked latents",
    lambda: train(masked_global(False), global_guide=AutoMultivariateNormal),
    "global_guide=AutoNormal",
    lambda: train(masked_global(False), global_guide=AutoNormal),
)
case(
    "a global latent masked in part",
    lambda: train(masked_global(True)),
    "a mask for whole events",
    lambda: train(masked_global(True, whole=True)),
)
case(
    "an instance of a global guide",
    lambda: AmortizedGuide(model, global_guide=AutoNormal(model)),
    "the class, global_guide=",
    lambda: train(global_guide=AutoNormal),
)
case("no model", lambda: AmortizedGuide(3), "the Pyro model itself", made)
case(
    "a state that is none",
    lambda: made().load_state_dict(3),
    r"guide.state_dict\(\) of a guide that was made alike",
    lambda: made().load_state_dict(made().state_dict()),
)
case(
    "the state of another guide",
    lambda: made().load_state_dict(made(model, AmortizedGuide, MLPEncoder(1, hidden_dims=(3,))).state_dict()),
    "the same model, family, encoder",
    lambda: made(model, AmortizedGuide, MLPEncoder(1, hidden_dims=(3,))).load_state_dict(
        made(model, AmortizedGuide, MLPEncoder(1, hidden_dims=(3,))).state_dict()
    ),
)


def reloaded(guide: Any) -> Any:
    return pickle.loads(pickle.dumps(guide))


def with_model(guide: Any) -> Any:
    guide = reloaded(guide)
    guide.model = model
    return guide


case(
    "a loaded guide without its model",
    lambda: reloaded(made())(X),
    "guide.model = model",
    lambda: with_model(made())(X),
)
case(
    "a loaded guide that refines",
    lambda: reloaded(made(model, SemiAmortizedGuide, num_steps=2, encoder_input="x"))(X),
    "guide.model = model",
    lambda: with_model(made(model, SemiAmortizedGuide, num_steps=2, encoder_input="x"))(X),
)
case(
    "an argument of a loaded guide",
    lambda: reloaded(made(encoder_input="x"))(x=X),
    "guide.model = model",
    lambda: with_model(made(encoder_input="x"))(x=X),
)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", case)
def test_the_remedy_helps(name: str) -> None:
    case.check(name)
