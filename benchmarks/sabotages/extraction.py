"""Faults in extraction."""

from benchmarks.sabotages.sabotage_class import Sabotage

EXTRACTION = (
    Sabotage(
        name="final norm in every layer",
        file="extract/backbones/timm_vit.py",
        old="norm=False",
        new="norm=True",
        tests=("tests/extract/test_backbone.py::test_tokens_are_what_the_blocks_return",),
    ),
    Sabotage(
        name="layers off by one",
        file="extract/backbones/timm_vit.py",
        old="indices=list(layers)",
        new="indices=[max(0, layer - 1) for layer in layers]",
        tests=("tests/extract/test_backbone.py::test_tokens_are_what_the_blocks_return",),
    ),
    Sabotage(
        name="rows of a batch in reverse",
        file="extract/job/shard_extractor.py",
        old="whole[places] = array",
        new="whole[places[::-1]] = array",
        tests=("tests/adapt/test_features.py::test_online_features_are_the_stored_ones_to_the_bit_whatever_the_batch",),
    ),
    Sabotage(
        name="int8 by the rms of another layer",
        file="extract/forward/encoding.py",
        old="_encode(values, dtype, rms.get(layer))",
        new="_encode(values, dtype, rms.get(min(tokens)))",
        tests=("tests/adapt/test_rounding.py::test_no_stored_value_differs_by_more_than_the_stated_rounding",),
    ),
    Sabotage(
        name="mixed precision ignored by the extraction",
        file="extract/forward/frozen_forward.py",
        old="with autocast(self.device, self.precision):",
        new='with autocast(self.device, "float32"):',
        tests=("tests/extract/test_backbone.py::test_tokens_come_out_as_float32_under_autocast",),
    ),
    Sabotage(
        name="backbone not frozen",
        file="extract/backbones/weights.py",
        old="model.eval().requires_grad_(False)",
        new="model.eval()",
        tests=("tests/adapt/test_features.py::test_no_gradient_reaches_the_backbone",),
    ),
    Sabotage(
        name="frozen backbone trained",
        file="extract/backbones/timm_vit.py",
        old="copy.deepcopy(self.module).requires_grad_(False)",
        new="copy.deepcopy(self.module).requires_grad_(True)",
        tests=("tests/adapt/test_methods.py::test_end_to_end_methods_train_as_many_parameters_as_their_formula",),
    ),
)
