"""What of PEFT's tests is run, how much of it must be, and what is known to fail and why."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Some of PEFT's test files, with NB-LoRA in place of one method."""

    method: str  # whose place NB-LoRA takes: "delora", "lora" or "lokr"
    least: dict[str, int]  # test file: how many of its tests must pass
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Skip:
    """Tests that are expected to fail. One that passes all the same fails the run."""

    pattern: str  # file::class::function[row]; "*" is anything
    reason: str
    methods: tuple[str, ...] = ("delora", "lora")
    run: bool = True  # False where trying is pointless: then the pattern must only match something


MATRICES: dict[str, Matrix] = {
    "delora": Matrix(
        "delora",
        {
            "test_custom_models.py": 270,
            "test_decoder_models.py": 130,
            "test_encoder_decoder_models.py": 45,
            "test_feature_extraction_models.py": 55,
            "test_seq_classifier.py": 28,
            "test_config.py": 22,
            "test_initialization.py": 2,
        },
    ),
    "lora": Matrix(
        "lora",
        {
            "test_custom_models.py": 1100,
            "test_decoder_models.py": 320,
            "test_encoder_decoder_models.py": 95,
            "test_feature_extraction_models.py": 110,
            "test_seq_classifier.py": 50,
            "test_config.py": 24,
            "test_helpers.py": 3,
            "test_integrations.py": 1,
            "test_low_level_api.py": 35,
            "test_mapping.py": 3,
            "test_other.py": 27,
            "test_stablediffusion.py": 3,
            "test_target_parameters.py": 200,
            "test_trainable_tokens.py": 29,
            "test_tuners_utils.py": 110,
            "test_vision_models.py": 1,
        },
    ),
    "conversion": Matrix("lokr", {"test_lora_conversion.py": 12}),
    "compile": Matrix("lora", {"test_torch_compile.py": 6}, {"PEFT_DEBUG_WITH_TORCH_COMPILE": "1"}),
}

_PRECISION = "adapters stay in float32 whatever autocast_adapter_dtype says: the bound needs it"
_FACTORS = "sums single factors of LoRA (linear, ties, dare, magnitude_prune), which here have no meaning"
_HUB = "asks the hub, which a run without network can't"
_LORA_ONLY = "PEFT does this for its own LoraLayer, LoraConfig or PeftType.LORA only"
_WORDS = "the same is refused in other words"
_INSIDE = "looks into LoRA's own layers"
_DECODER = "test_decoder_models.py::TestDecoderModels::"
_SEQ2SEQ = "test_encoder_decoder_models.py::TestEncoderDecoderModels::"
_CUSTOM = "test_custom_models.py::TestPeftCustomModel::"
_LAYERS = "test_tuners_utils.py::TestModelAndLayerStatus::"
_PARAMETERS = "test_target_parameters.py::TestTargetParameters::"
_LORA = ("lora",)

SKIPS: tuple[Skip, ...] = (
    # precision
    Skip(_CUSTOM + "test_adapter_dtype_autocast[*-False-dtype0-*", _PRECISION),
    Skip(_CUSTOM + "test_adapter_dtype_autocast[*-False-dtype1-*", _PRECISION),
    Skip(_DECODER + "test_add_adapter_no_autocast_adapter_dtype[*", _PRECISION),
    Skip(_SEQ2SEQ + "test_add_adapter_no_autocast_adapter_dtype[dtype1-*", _PRECISION),
    Skip(_SEQ2SEQ + "test_add_adapter_no_autocast_adapter_dtype[dtype0-*Bart*", _PRECISION),
    Skip("test_seq_classifier.py::*::test_add_adapter_no_autocast_adapter_dtype[*", _PRECISION),
    Skip("test_lora_conversion.py::*::test_convert_float16_dtype[*", _PRECISION, ("lokr",)),
    Skip("test_helpers.py::TestDisableInputDtypeCasting::*", "LoRA's switch for its casts of inputs", _LORA),
    # combinations of adapters
    *(
        Skip(_CUSTOM + f"test_add_weighted_adapter_with_different_scaling[{kind}*", _FACTORS, _LORA)
        for kind in ("linear", "ties", "dare", "magnitude_prune")
    ),
    Skip(_CUSTOM + "test_add_weighted_adapter_negative_weight_negates_adapter", _FACTORS, _LORA),
    Skip(_CUSTOM + "test_add_weighted_adapter_subtraction_with_negative_weights", _FACTORS, _LORA),
    Skip("*::test_weighted_combination_of_adapters[*", _FACTORS, _LORA),
    # what PEFT does only for LoRA
    Skip("test_custom_models.py::TestDynamicDispatch::*", _LORA_ONLY, _LORA),
    Skip(_CUSTOM + "test_add_adapter_rejects_duplicate_name_without_mutation[True]", _LORA_ONLY, _LORA),
    Skip(_LAYERS + "test_mixed_model_raises", _LORA_ONLY, _LORA),
    *(
        Skip(f"test_helpers.py::TestScalingAdapters::test_{name}", _LORA_ONLY, _LORA)
        for name in (
            "diffusers_pipeline",
            "merging_adapter",
            "multi_adapters",
            "rescale_adapter_scale",
            "scaling_set_to_zero",
            "transformers_pipeline",
        )
    ),
    Skip("test_integrations.py::TestTransformersV5::test_qwen3_moe_*", _LORA_ONLY, _LORA),
    Skip("test_config.py::TestLoraNestedConfigRoundTrip::*", _LORA_ONLY, _LORA),
    Skip("test_config.py::TestPeftConfig::test_save_pretrained_with_runtime_config[*", _LORA_ONLY),
    Skip("test_config.py::TestPeftConfig::test_lora_config_layers_to_transform_validation", _WORDS, _LORA),
    Skip("test_config.py::TestPeftConfig::test_regex_with_layer_indexing_lora", _WORDS, _LORA),
    Skip(
        "test_low_level_api.py::TestStateDictFsdpShapeValidation::test_save_pretrained_warns_*",
        _LORA_ONLY,
        _LORA,
    ),
    # LoRA's insides
    Skip(
        "test_initialization.py::TestDeLoRAInitialization::test_delora_param_shapes",
        "looks into DeLoRA's own layers",
    ),
    Skip("test_custom_models.py::TestLayerRepr::test_repr_lora_conv1d", _INSIDE, _LORA),
    Skip(_CUSTOM + "test_mha_gradients_set_correctly[*", _INSIDE, _LORA),
    Skip(_PARAMETERS + "test_target_multiple_parameters_on_same_module", _INSIDE, _LORA),
    Skip(_PARAMETERS + "test_target_parameters_forward_under_autocast", _INSIDE, _LORA),
    Skip(_PARAMETERS + "test_target_parameter_result_caching_works", _INSIDE, _LORA),
    Skip(_LAYERS + "test_requires_grad_irregular", _INSIDE, _LORA),
    Skip(_LAYERS + "test_model_requires_grad_model_irregular", _INSIDE, _LORA),
    Skip(
        "test_tuners_utils.py::TestPeftCustomKwargs::test_add_second_adapter_with_all_linear_works", _INSIDE
    ),
    Skip(
        "test_tuners_utils.py::*::test_prefixes_select_correct_state_dict_keys",
        "an adapter has a radius too",
        _LORA,
    ),
    # ranks
    Skip(_LAYERS + "test_model_with_injected_layers", "ranks stop at a layer's size", _LORA),
    Skip(_LAYERS + "test_nb_params_large", "ranks stop at a layer's size", _LORA),
    Skip(
        "test_target_parameters.py::test_rank_pattern_for_moe_target_parameters",
        "an expert's factors are a slice each of one tensor of LoRA's",
        _LORA,
    ),
    Skip(
        _CUSTOM + "test_add_weighted_adapter_with_different_scaling[svd-0.99-0.01-weights0]",
        "rank 8 holds less of a sum with a flat spectrum",
        _LORA,
    ),
    Skip(
        _CUSTOM + "test_add_weighted_adapter_with_different_scaling[svd-0.99-0.01-weights3]",
        "rank 8 holds less of a sum with a flat spectrum",
        _LORA,
    ),
    Skip(
        _PARAMETERS + "test_target_parameters_works_with_existing_parametrization",
        "sets factors to ones and expects their product, which here is bounded",
        _LORA,
    ),
    Skip(
        _CUSTOM + "test_merge_layers_is_deterministic_in_train_mode[MHA*",
        "dropout is refused for nn.MultiheadAttention",
        _LORA,
    ),
    Skip(
        _CUSTOM + "test_only_params_are_updated[Conv2d Groups2 LoRA-*",
        "at its learning rate of 0.5 the outputs' factor runs away, and the inputs' hardly moves",
        _LORA,
    ),
    # other
    Skip(
        "test_low_level_api.py::*::test_inject_from_state_dict_missing_keys_warning",
        "the layer is still known by its radius",
        _LORA,
    ),
    Skip(
        "test_lora_conversion.py::TestLoraConversion::test_model_with_unsupported_layers_raises",
        "convolutions are converted too",
        ("lokr",),
    ),
    *(
        Skip(f"test_lora_conversion.py::TestLoraConversion::test_{name}", reason, ("lokr",))
        for name, reason in (
            ("converted_lora_approximates_original_adapter", "its thresholds are for LoKr's random starts"),
            ("converted_lora_with_multiple_adapters", "its thresholds are for LoKr's random starts"),
            ("with_torch_compile", "compiled and eager updates differ in rounding, which the SVD amplifies"),
        )
    ),
    *(
        Skip(
            f"test_torch_compile.py::TestTorchCompileCausalLM::test_causal_lm_{name}_compile",
            "loads the model in 4 bits, which on a CPU needs larger layers than this model's",
            _LORA,
            run=False,
        )
        for name in (
            "training_lora_bnb",
            "multiple_lora_adapter",
            "disable_lora_adapter",
            "merging_lora_adapter",
            "merging_multiple_lora_adapters",
            "merge_and_unload_lora_adapter",
            "mixed_batch_lora_adapter",
            "add_weighted_adapter_lora_adapter",
        )
    ),
    # the hub
    Skip("test_config.py::TestPeftConfig::test_from_pretrained_cache_dir[*", _HUB),
    Skip("test_integrations.py::TestTransformersV5::test_mixtral_v4_lora_weight_conversion_*", _HUB, _LORA),
    Skip("test_other.py::test_get_peft_model_revision_warning", _HUB, _LORA),
    Skip("test_trainable_tokens.py::TestTrainableTokens::test_save_pretrained_auto[*-True]", _HUB, _LORA),
)
