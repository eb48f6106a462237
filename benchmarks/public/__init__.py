"""Public models, in files by their kind."""

from collections.abc import Callable

from public._model import PublicModel
from public.autoencoders import cvae, ss_vae, vae
from public.causal import cevae
from public.cells import cell2location, scanvi
from public.factors import sparse_gamma_def
from public.regression import baseball, baseball_logit, eight_schools
from public.sequences import dmm, mixed_hmm
from public.topics import amortized_lda, lda, prodlda

__all__ = ["MODELS", "PublicModel"]

MODELS: dict[str, Callable[[], PublicModel]] = {
    "vae": vae,
    "ss_vae_M2": ss_vae,
    "cvae": cvae,
    "dmm": dmm,
    "lda": lda,
    "sparse_gamma_def": sparse_gamma_def,
    "scanvi": scanvi,
    "cevae": cevae,
    "mixed_hmm": mixed_hmm,
    "baseball": baseball,
    "baseball, logit": baseball_logit,
    "eight_schools": eight_schools,
    "prodlda": prodlda,
    "AmortizedLDA": amortized_lda,
    "cell2location": cell2location,
}
