import warnings
from collections.abc import Iterator
from zlib import crc32

import pyro
import pytest
import torch

torch.set_num_threads(1)  # on tensors as small as those of the tests, further threads only wait for each other


SLOW = (
    "test_autoguide_parity.py::test_models_of_any_kind[IterativeAmortizedGuide-unhashable]",
    "test_autoguide_parity.py::test_models_of_any_kind[SemiAmortizedGuide",
    "test_bounds.py::test_a_poor_proposal",
    "test_certificates.py::test_a_procedure_whose_draws_are_too_narrow",
    "test_certificates.py::test_particles_find_both_modes_of_a_mixture[4]",
    "test_certificates.py::test_what_does_not_converge_is_marked",
    "test_certificates.py::test_where_weights_do_not_do_chains_are_certified",
    "test_certificates.py::test_without_certificates",
    "test_collapse.py::test_all_guides_with_global_latents[iterative]",
    "test_comparison.py::test_an_encoder_that_fails_on_new_data",
    "test_comparison.py::test_the_best_guide_is_found_by_pairs",
    "test_discrete.py::test_families_beside_discrete_latents[flow]",
    "test_discrete.py::test_in_inner_plates_beside_global_latents",
    "test_export.py::test_guides[topics-iterative]",
    "test_export.py::test_guides[topics-refined]",
    "test_export.py::test_guides[topics-semi_amortized]",
    "test_family_laws.py::test_gaps_do_not_change_with_the_units_of_z[flow]",
    "test_family_laws.py::test_gaps_do_not_change_with_the_units_of_z[low_rank_multivariate_normal]",
    "test_family_laws.py::test_gaps_do_not_change_with_the_units_of_z[mixture]",
    "test_family_laws.py::test_gaps_do_not_change_with_the_units_of_z[multivariate_normal]",
    "test_family_laws.py::test_gaps_do_not_change_with_the_units_of_z[structured]",
    "test_family_laws.py::test_reparameterised_gradients_are_those_of_the_expectation[noise-spline_flow-2]",
    "test_family_laws.py::test_reparameterised_gradients_are_those_of_the_expectation[rsample-spline_flow-2]",
    "test_family_laws.py::test_rsample_and_forward_are_the_same_law[eight_components-4]",
    "test_family_laws.py::test_rsample_and_forward_are_the_same_law[spline_flow-4]",
    "test_family_laws.py::test_rsample_and_forward_are_the_same_law[zuko_flow-4]",
    "test_fuzz.py::test_mistakes_are_found[wrong_rows]",
    "test_family_laws.py::test_total_mass_is_one_in_2d[spline_flow]",
    "test_family_laws.py::test_total_mass_is_one_in_2d[zuko_flow]",
    "test_gaps.py::test_a_skewed_posterior_against_a_grid[AmortizedGuide-low_rank_multivariate_normal]",
    "test_gaps.py::test_a_skewed_posterior_against_a_grid[AmortizedGuide-multivariate_normal]",
    "test_gaps.py::test_a_skewed_posterior_against_a_grid[AmortizedGuide-normal]",
    "test_gaps.py::test_a_skewed_posterior_against_a_grid[PerDatapointGuide-low_rank_multivariate_normal]",
    "test_gaps.py::test_a_skewed_posterior_against_a_grid[PerDatapointGuide-multivariate_normal]",
    "test_gaps.py::test_an_encoder_with_a_shifted_mean_has_the_amortization_gap_of_its_shift[hard]",
    "test_gaps.py::test_annealing_from_a_poor_proposal[0.1]",
    "test_gaps.py::test_gaps_of_the_best_mean_field_guide[easy]",
    "test_gaps.py::test_strong_correlations_and_differences_of_scale[multivariate_normal-dtype0]",
    "test_gaps.py::test_strong_correlations_and_differences_of_scale[multivariate_normal-dtype1]",
    "test_gaps.py::test_strong_correlations_and_differences_of_scale[normal-dtype0]",
    "test_gaps.py::test_the_full_rank_family_has_no_approximation_gap[easy]",
    "test_gaps.py::test_the_local_optimum_is_one[hard]",
    "test_gaps.py::test_the_low_rank_family_lies_between",
    "test_host_conventions.py::test_inside_plates_of_the_caller[IterativeAmortizedGuide-3]",
    "test_lightning.py::test_lightning_checkpoint[IterativeAmortizedGuide]",
    "test_lightning.py::test_lightning_trains_as_a_loop_by_hand[IterativeAmortizedGuide]",
    "test_mixture.py::test_semi_amortized[options1]",
    "test_mixture.py::test_semi_amortized[options2]",
    "test_newton.py::test_curvature_of_a_normal_model_is_exact_without_ridge[33-MultivariateNormal-True]",
    "test_newton.py::test_few_steps_reach_the_optimum_of_correlated_latents[MultivariateNormal]",
    "test_newton.py::test_narrow_likelihoods_are_reached_from_afar",
    "test_noise.py::test_diagnostics_depend_on_their_own_seed_only[global latents]",
    "test_noise.py::test_diagnostics_depend_on_their_own_seed_only[shapes seen before]",
    "test_noise.py::test_diagnostics_leave_the_global_seed_alone[optimize_local-own noise]",
    "test_properties.py::test_any_structure[AmortizedGuide-normal]",
    "test_properties.py::test_any_structure_refined[IterativeAmortizedGuide-normal]",
    "test_properties.py::test_mistakes_are_found[wrong_log_det-flow-check_density]",
    "test_properties.py::test_mistakes_are_found[wrong_log_det-multivariate_normal-check_density]",
    "test_properties.py::test_mistakes_are_found[wrong_order-normal-check_round_trip]",
    "test_properties.py::test_mistakes_are_found[wrong_scale-normal-check_elbo]",
    "test_quantization.py::test_training_finds_the_clusters[False]",
    "test_refinement.py::test_answers_do_not_depend_on_the_batch[normal-iterative",
    "test_refining_guides.py::test_enumerated_latents_are_summed_out_in_refinement[distill]",
    "test_refining_guides.py::test_every_elbo_trains_with_global_latents[iterative]",
    "test_refinement.py::test_every_guide_can_be_refined_to_its_familys_optimum[iterative-normal]",
    "test_refinement.py::test_fixed_noise_leaves_the_global_generator_alone[mixture-iterative-prior]",
    "test_refinement_gradients.py::test_more_learned_steps_than_in_training_do_no_harm",
    "test_refining_guides.py::test_predictive_and_calls_without_gradients[iterative",
    "test_refinement.py::test_refined_guide_shares_parameters_and_leaves_the_guide_alone[iterative]",
    "test_refinement.py::test_refined_guide_shares_parameters_and_leaves_the_guide_alone[per_datapoint]",
    "test_refinement.py::test_refined_guide_shares_parameters_and_leaves_the_guide_alone[semi_amortized]",
    "test_refinement.py::test_refined_guide_with_fixed_noise_can_be_repeated_whatever_it_refines[iterative]",
    "test_refining_guides.py::test_state_dict_restores_every_answer[iterative-False]",
    "test_resume.py::test_resumed_losses_are_equal_to_the_last_digit[AmortizedGuide-options1]",
    "test_resume.py::test_resumed_losses_are_equal_to_the_last_digit[IterativeAmortizedGuide-options5]",
    "test_resume.py::test_resumed_losses_are_equal_to_the_last_digit[SemiAmortizedGuide",
    "test_signal.py::test_training_by_wake_sleep_does_not_diverge[initial]",
    "test_signal.py::test_training_by_wake_sleep_does_not_diverge[iterative]",
    "test_signal.py::test_wake_sleep_trains_the_guide_as_the_elbo_does[distill]",
    "test_signal.py::test_wake_sleep_trains_the_guide_as_the_elbo_does[iterative]",
    "test_steps.py::test_trains_on_any_number_of_steps[SemiAmortizedGuide-TraceMeanField_ELBO]",
    "test_steps.py::test_trains_on_any_number_of_steps[SemiAmortizedGuide-Trace_ELBO]",
    "test_structured.py::test_every_guide_trains[IterativeAmortizedGuide-options4-0.01]",
    "test_structured.py::test_every_guide_trains[SemiAmortizedGuide-options2-0.02]",
    "test_structured.py::test_every_guide_trains[SemiAmortizedGuide-options3",
    "test_structured.py::test_shared_head_with_masks_refinement_and_diagnostics",
    "test_wake_sleep.py::test_compiled_inference[full]",
    "test_wake_sleep.py::test_sleep_trains_on_what_the_model_simulates[closed]",
    "test_wake_sleep.py::test_sleep_trains_on_what_the_model_simulates[full]",
    "test_wake_sleep.py::test_sleep_trains_on_what_the_model_simulates[random]",
    "test_weights.py::test_missing_observations_are_latent[multivariate_normal]",
    "test_weights.py::test_refinement_and_diagnostics_under_masks[sequence",
    "test_weights.py::test_refinement_and_diagnostics_under_masks[within-flow]",
    "test_weights.py::test_refinement_and_diagnostics_under_masks[within-normal]",
    "test_zoo.py::test_gaps_of_unseen_data[cevae-amortized]",
    "test_zoo.py::test_gaps_of_unseen_data[lda-amortized]",
    "test_zoo.py::test_gaps_of_unseen_data[missing_data-amortized]",
    "test_zoo.py::test_gaps_of_unseen_data[sparse_gamma-amortized]",
    "test_zoo.py::test_takes_unseen_data[cevae-amortized]",
    "test_zoo.py::test_takes_unseen_data[hierarchical-amortized]",
    "test_zoo.py::test_takes_unseen_data[lda-amortized]",
    "test_zoo.py::test_takes_unseen_data[missing_data-iterative]",
    "test_zoo.py::test_takes_unseen_data[missing_data-semi-amortized]",
    "test_zoo.py::test_takes_unseen_data[semi_supervised-amortized]",
    "test_zoo.py::test_takes_unseen_data[sparse_gamma-amortized]",
    "test_zoo.py::test_trains[missing_data-iterative]",
    "test_zoo.py::test_trains[missing_data-semi-amortized]",
    "test_zoo.py::test_trains[sparse_gamma-amortized]",
    "test_zoo_b.py::test_deep_markov_model_trains[iterative]",
    "test_zoo_b.py::test_deep_markov_model_trains[semi-amortized]",
    "test_zoo_b.py::test_evidence_of_what_is_present[make_problem_with_latent_entries]",
    "test_zoo_b.py::test_imputation_beats_means[make_problem_with_latent_entries]",
    "test_zoo_b.py::test_missing_entries_as_latents[iterative]",
    "test_zoo_b.py::test_missing_entries_as_latents[semi-amortized]",
)
"""Cases, by how their names begin, that take seconds, of tests of which another case runs by default."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--part 0/3`` runs the first third of the tests that are chosen, the cases of a test together."""
    parser.addoption("--part", default="0/1", help="number of a part and number of parts, such as 0/3")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks them as slow, and leaves out tests of other parts than the one asked for."""
    for item in items:
        if item.nodeid.rpartition("/")[2].startswith(SLOW):
            item.add_marker(pytest.mark.slow)
    part, parts = map(int, config.getoption("--part").split("/"))
    if parts > 1:
        left = [item for item in items if crc32(item.nodeid.partition("[")[0].encode()) % parts != part]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


@pytest.fixture(autouse=True)
def _fresh_pyro() -> Iterator[None]:
    """Every test starts from an empty parameter store, a fixed seed and validation, and leaves no dtype behind."""
    dtype = torch.get_default_dtype()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.validation_enabled(True):
        yield
    torch.set_default_dtype(dtype)
    pyro.clear_param_store()


@pytest.fixture
def _float64(_fresh_pyro: None) -> None:
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def _compiler() -> Iterator[None]:
    """TorchInductor warns of deprecations of its own making."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="compile=True has no effect")
        yield
