import warnings
from collections.abc import Iterator
from zlib import crc32

import pyro
import pytest
import torch

torch.set_num_threads(1)  # on tensors as small as those of the tests, further threads only wait for each other


SLOW = (
    "test_autoguide_parity.py::test_improper_priors[IterativeAmortizedGuide]",
    "test_autoguide_parity.py::test_improper_priors[SemiAmortizedGuide]",
    "test_autoguide_parity.py::test_models_of_any_kind[AmortizedGuide-partial]",
    "test_autoguide_parity.py::test_models_of_any_kind[AmortizedGuide-unhashable]",
    "test_autoguide_parity.py::test_models_of_any_kind[IterativeAmortizedGuide-partial]",
    "test_autoguide_parity.py::test_models_of_any_kind[IterativeAmortizedGuide-unhashable]",
    "test_autoguide_parity.py::test_models_of_any_kind[PerDatapointGuide-partial]",
    "test_autoguide_parity.py::test_models_of_any_kind[SemiAmortizedGuide",
    "test_bad_input.py::test_bad_input_is_refused_at_once[refinement of a non-finite decoder by, network]",
    "test_bounds.py::test_a_poor_proposal",
    "test_certificates.py::test_a_bad_guide_changes_the_cost_and_nothing_else[0.0-0.2-full_rank]",
    "test_certificates.py::test_a_procedure_whose_draws_are_too_narrow",
    "test_certificate_stages.py::test_particles_find_both_modes_of_a_mixture[4]",
    "test_certificates.py::test_what_does_not_converge_is_marked",
    "test_certificates.py::test_where_weights_do_not_do_chains_are_certified",
    "test_certificates.py::test_without_certificates",
    "test_collapse.py::test_all_guides_with_global_latents[iterative]",
    "test_comparison.py::test_an_encoder_that_fails_on_new_data",
    "test_comparison.py::test_the_best_guide_is_found_by_pairs",
    "test_compatibility.py::test_a_wrong_scale_is_found[IterativeAmortizedGuide-Trace_ELBO]",
    "test_compatibility.py::test_every_combination[datapoints at dim -3, two inner plates-IterativeAmortizedGuide]",
    "test_compatibility.py::test_every_family[datapoints at dim -3, two inner plates-structured]",
    "test_conditioning.py::test_refining_guides[IterativeAmortizedGuide]",
    "test_dimensions.py::test_other_guides[IterativeAmortizedGuide-right]",
    "test_dimensions.py::test_other_guides[SemiAmortizedGuide-beside]",
    "test_dimensions.py::test_other_guides[SemiAmortizedGuide-left]",
    "test_discrete.py::test_families_beside_discrete_latents[flow]",
    "test_discrete.py::test_in_inner_plates_beside_global_latents",
    "test_experiments.py::test_runs[codes]",
    "test_experiments.py::test_runs[margossian_blei]",
    "test_export_models.py::test_draws_are_vectorised[topics-modes0]",
    "test_export.py::test_guides[linear-iterative]",
    "test_export.py::test_guides[linear-semi_amortized]",
    "test_export.py::test_guides[topics-iterative]",
    "test_export.py::test_guides[topics-refined]",
    "test_export.py::test_guides[topics-semi_amortized]",
    "test_family_laws.py::test_gaps_do_not_change_with_the_units_of_z[flow]",
    "test_family_laws.py::test_gaps_do_not_change_with_the_units_of_z[low_rank_multivariate_normal]",
    "test_family_laws.py::test_gaps_do_not_change_with_the_units_of_z[mixture]",
    "test_family_laws.py::test_gaps_do_not_change_with_the_units_of_z[multivariate_normal]",
    "test_family_laws.py::test_gaps_do_not_change_with_the_units_of_z[structured]",
    "test_family_laws.py::test_quantiles_are_those_of_draws[spline_flow]",
    "test_family_laws.py::test_reparameterised_gradients_are_those_of_the_expectation[rsample-spline_flow-2]",
    "test_family_laws.py::test_rsample_and_forward_are_the_same_law[eight_components-4]",
    "test_family_laws.py::test_rsample_and_forward_are_the_same_law[spline_flow-4]",
    "test_family_laws.py::test_rsample_and_forward_are_the_same_law[zuko_flow-4]",
    "test_family_laws.py::test_total_mass_is_one_in_2d[flow]",
    "test_family_laws.py::test_total_mass_is_one_in_2d[spline_flow]",
    "test_family_laws.py::test_total_mass_is_one_in_2d[zuko_flow]",
    "test_fuzz.py::test_mistakes_are_found[wrong_rows]",
    "test_fuzz.py::test_random_structures[0]",
    "test_fuzz.py::test_random_structures[1]",
    "test_fuzz.py::test_random_structures[3]",
    "test_fuzz.py::test_random_structures[5]",
    "test_gaps.py::test_a_skewed_posterior_against_a_grid[AmortizedGuide-low_rank_multivariate_normal]",
    "test_gaps.py::test_a_skewed_posterior_against_a_grid[AmortizedGuide-multivariate_normal]",
    "test_gaps.py::test_a_skewed_posterior_against_a_grid[AmortizedGuide-normal]",
    "test_gaps.py::test_a_skewed_posterior_against_a_grid[PerDatapointGuide-low_rank_multivariate_normal]",
    "test_gaps.py::test_a_skewed_posterior_against_a_grid[PerDatapointGuide-multivariate_normal]",
    "test_gaps.py::test_a_stalled_optimisation_has_not_converged[easy]",
    "test_gaps.py::test_an_encoder_with_a_shifted_mean_has_the_amortization_gap_of_its_shift[hard]",
    "test_gaps.py::test_gaps_of_the_best_mean_field_guide[easy]",
    "test_gaps.py::test_strong_correlations_and_differences_of_scale[multivariate_normal-dtype0]",
    "test_gaps.py::test_strong_correlations_and_differences_of_scale[multivariate_normal-dtype1]",
    "test_gaps.py::test_strong_correlations_and_differences_of_scale[normal-dtype0]",
    "test_gaps.py::test_the_full_rank_family_has_no_approximation_gap[easy]",
    "test_gaps.py::test_the_local_optimum_is_one[hard]",
    "test_gaps.py::test_the_low_rank_family_lies_between",
    "test_graphs.py::test_graphs_give_the_numbers_and_derivatives_of_the_model[False-analytic_kl]",
    "test_graphs.py::test_guides_refine_and_train_as_without_graphs[custom-first_order]",
    "test_graphs.py::test_refined_and_the_blocks_of_diagnostics_give_the_same_without_graphs[custom]",
    "test_groups.py::test_guides[PerDatapointGuide]",
    "test_groups.py::test_guides[SemiAmortizedGuide]",
    "test_guides.py::test_elbo_module_trains_with_torch_optim[low_rank_multivariate_normal-AmortizedGuide]",
    "test_guides.py::test_elbo_module_trains_with_torch_optim[low_rank_multivariate_normal-PerDatapointGuide]",
    "test_guides.py::test_elbo_module_trains_with_torch_optim[multivariate_normal-AmortizedGuide]",
    "test_guides.py::test_elbo_module_trains_with_torch_optim[multivariate_normal-PerDatapointGuide]",
    "test_guides.py::test_elbo_module_trains_with_torch_optim[normal-AmortizedGuide]",
    "test_guides.py::test_global_latents_alone[PerDatapointGuide]",
    "test_guides.py::test_mean_field_elbo_agrees_in_expectation[low_rank_multivariate_normal]",
    "test_guides.py::test_mean_field_elbo_agrees_in_expectation[multivariate_normal]",
    "test_hard_evidence.py::test_mass_where_the_transform_saturates_counts[dtype1]",
    "test_host_conventions.py::test_double_precision_model_under_single_precision_default[SemiAmortizedGuide-normal]",
    "test_host_conventions.py::test_elbo_module_with_a_torch_optimizer[IterativeAmortizedGuide]",
    "test_host_conventions.py::test_factors_of_the_model[SemiAmortizedGuide-normal]",
    "test_host_conventions.py::test_inside_plates_of_the_caller[IterativeAmortizedGuide-3]",
    "test_host_conventions.py::test_inspection[SemiAmortizedGuide]",
    "test_host_conventions.py::test_nothing_remembers_precision_or_device[SemiAmortizedGuide-normal]",
    "test_host_conventions.py::test_renyi_elbo_with_one_particle_is_the_elbo[SemiAmortizedGuide]",
    "test_iwelbo.py::test_guides_train[iterative]",
    "test_iwelbo.py::test_guides_train[semi_amortized]",
    "test_lightning.py::test_a_resumed_run_has_the_losses_of_an_unbroken_one[amortized]",
    "test_lightning.py::test_mixed_precision_and_clipping[anchored]",
    "test_lightning.py::test_trains_as_svi_does[distill]",
    "test_log_evidence.py::test_annealing_from_a_poor_proposal[0.1]",
    "test_mixture.py::test_semi_amortized[options1]",
    "test_mixture.py::test_semi_amortized[options2]",
    "test_module_models.py::test_options_of_the_optimizer_by_parameter[SemiAmortizedGuide]",
    "test_nested_guides.py::test_in_a_list[IterativeAmortizedGuide-True]",
    "test_nested_guides.py::test_plates_of_the_user[SemiAmortizedGuide]",
    "test_newton.py::test_few_steps_reach_the_optimum_of_correlated_latents[MultivariateNormal]",
    "test_newton.py::test_narrow_likelihoods_are_reached_from_afar",
    "test_noise.py::test_diagnostics_depend_on_their_own_seed_only[global latents]",
    "test_noise.py::test_diagnostics_depend_on_their_own_seed_only[new shapes]",
    "test_noise.py::test_diagnostics_depend_on_their_own_seed_only[shapes seen before]",
    "test_properties.py::test_any_structure[AmortizedGuide-multivariate_normal]",
    "test_properties.py::test_any_structure[AmortizedGuide-normal]",
    "test_properties.py::test_any_structure[PerDatapointGuide-multivariate_normal]",
    "test_properties.py::test_any_structure_refined[IterativeAmortizedGuide-normal]",
    "test_properties.py::test_mistakes_are_found[wrong_log_det-flow-check_density]",
    "test_properties.py::test_mistakes_are_found[wrong_log_det-multivariate_normal-check_density]",
    "test_properties.py::test_mistakes_are_found[wrong_order-normal-check_round_trip]",
    "test_properties.py::test_mistakes_are_found[wrong_scale-normal-check_elbo]",
    "test_quantization.py::test_training_finds_the_clusters[False]",
    "test_ready_made.py::test_training_on_features_of_steps_is_steady[options2",
    "test_refinement.py::test_answers_do_not_depend_on_the_batch[normal-iterative",
    "test_refinement.py::test_datapoints_without_an_elbo_get_no_answer[SemiAmortizedGuide]",
    "test_refinement.py::test_divergence_in_training_names_the_datapoints[initial]",
    "test_refinement.py::test_every_guide_can_be_refined_to_its_familys_optimum[iterative-normal]",
    "test_refinement.py::test_fixed_noise_leaves_the_global_generator_alone[mixture-iterative-prior]",
    "test_refinement.py::test_fixed_noise_leaves_the_global_generator_alone[topics-unrolled-encoder]",
    "test_refinement.py::test_gradients_reach_a_learned_prior_that_refinement_starts_at[Adam]",
    "test_refinement.py::test_refined_guide_shares_parameters_and_leaves_the_guide_alone[iterative]",
    "test_refinement.py::test_refined_guide_shares_parameters_and_leaves_the_guide_alone[per_datapoint]",
    "test_refinement.py::test_refined_guide_shares_parameters_and_leaves_the_guide_alone[semi_amortized]",
    "test_refinement.py::test_refined_guide_with_fixed_noise_can_be_repeated_whatever_it_refines[iterative]",
    "test_refinement.py::test_steps_are_as_long_whatever_the_scale_of_the_model[ascent-large]",
    "test_refinement.py::test_steps_are_as_long_whatever_the_scale_of_the_model[ascent-small]",
    "test_refinement.py::test_steps_are_as_long_whatever_the_scale_of_the_model[natural-large]",
    "test_refinement.py::test_steps_are_as_long_whatever_the_scale_of_the_model[natural-small]",
    "test_refinement.py::test_steps_do_not_see_the_scale_of_a_subsampled_plate[iterative]",
    "test_refinement.py::test_steps_do_not_see_the_scale_of_a_subsampled_plate[unrolled]",
    "test_refinement_gradients.py::test_checkpoint_changes_neither_loss_nor_gradients[natural-0.0]",
    "test_refinement_gradients.py::test_more_learned_steps_than_in_training_do_no_harm",
    "test_refinement_gradients.py::test_signal_adds_exactly_zero_to_the_loss[first_order]",
    "test_refinement_gradients.py::test_unrolled_gradients_equal_a_loop_by_hand[natural-plain]",
    "test_refining_guides.py::test_enumerated_latents_are_summed_out_in_refinement[distill]",
    "test_refining_guides.py::test_every_elbo_trains_with_global_latents[iterative]",
    "test_refining_guides.py::test_predictive_and_calls_without_gradients[iterative",
    "test_refining_guides.py::test_state_dict_restores_every_answer[iterative-False]",
    "test_refining_guides.py::test_training_lowers_the_loss[iterative]",
    "test_resume.py::test_resumed_losses_are_equal_to_the_last_digit[AmortizedGuide-options1]",
    "test_resume.py::test_resumed_losses_are_equal_to_the_last_digit[IterativeAmortizedGuide-options5]",
    "test_resume.py::test_resumed_losses_are_equal_to_the_last_digit[SemiAmortizedGuide",
    "test_saving.py::test_a_loaded_guide_in_evaluation_mode_answers_in_it[eval-IterativeAmortizedGuide]",
    "test_saving.py::test_a_loaded_guide_in_evaluation_mode_answers_in_it[eval-SemiAmortizedGuide]",
    "test_saving.py::test_a_loaded_guide_in_evaluation_mode_answers_in_it[load-IterativeAmortizedGuide]",
    "test_serving.py::test_every_encoder[transformer]",
    "test_serving.py::test_every_family[normal]",
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
    "test_tables.py::test_sparse_table_without_subsampling[True]",
    "test_training.py::test_refinement_keeps_to_the_plain_elbo[IterativeAmortizedGuide]",
    "test_wake_sleep.py::test_compiled_inference[full]",
    "test_wake_sleep.py::test_sleep_trains_on_what_the_model_simulates[closed]",
    "test_wake_sleep.py::test_sleep_trains_on_what_the_model_simulates[full]",
    "test_wake_sleep.py::test_sleep_trains_on_what_the_model_simulates[random]",
    "test_weights.py::test_a_scale_of_one_is_none[one1]",
    "test_weights.py::test_missing_observations_are_latent[multivariate_normal]",
    "test_weights.py::test_refinement_and_diagnostics_under_masks[sequence",
    "test_weights.py::test_refinement_and_diagnostics_under_masks[within-flow]",
    "test_weights.py::test_refinement_and_diagnostics_under_masks[within-normal]",
    "test_weights.py::test_refinement_climbs_the_scaled_elbo[beta1]",
    "test_weights.py::test_refinement_climbs_the_scaled_elbo[beta2]",
    "test_zoo.py::test_gaps_of_unseen_data[sparse_gamma",
    "test_zoo.py::test_takes_unseen_data[cevae-amortized]",
    "test_zoo.py::test_takes_unseen_data[hierarchical-amortized]",
    "test_zoo.py::test_takes_unseen_data[lda-amortized]",
    "test_zoo.py::test_takes_unseen_data[missing_data-iterative]",
    "test_zoo.py::test_takes_unseen_data[missing_data-semi-amortized]",
    "test_zoo.py::test_takes_unseen_data[semi_supervised-amortized]",
    "test_zoo.py::test_takes_unseen_data[single_cell-amortized]",
    "test_zoo.py::test_takes_unseen_data[sparse_gamma-amortized]",
    "test_zoo.py::test_trains[cevae-amortized]",
    "test_zoo.py::test_trains[hierarchical-amortized]",
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
    begun = set()
    for item in items:
        name = item.nodeid.rpartition("/")[2]
        test, case = name.partition("[")[0], name.partition("::")[2]
        thinned = item.get_closest_marker("thinned") and crc32(case.encode()) % 3 and test in begun
        begun.add(test)
        elsewhere = any(item.get_closest_marker(name) for name in ("gpu", "fake_device"))
        if (thinned or name.startswith(SLOW)) and not elsewhere:
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
