"""The model card: what a reader of model/ should know before using it."""

from collections.abc import Collection

from draf_dist.models.kinds import ModelConfig
from draf_dist.models.link import link_of
from draf_dist.models.mc import Scope
from draf_dist.models.segmentation import BayesianUnetConfig
from draf_dist.schema.categories import category_counts
from draf_dist.schema.label import MultiLabelSpec, SegmentationSpec, SurvivalSpec, TaskSpec
from draf_dist.schema.modality import DataSchema, ModalitySpec

_LABELS = {
    "draf": "DRAF, dynamic reliability-aware fusion",
    "mean": "plain mean of features",
    "concat": "feature concatenation",
    "aum": "AUM, Gaussian modalities on a graph",
    "late_mean": "late fusion of independent unimodal nets",
    "healnet": "HEALNet, latents that read the modalities in turn",
    "early": "early fusion of raw inputs",
    "mda": "MDA (re-derived)",
    "gated_evidence": "gated additive evidence",
    "severity_rejection": "severity rejection around another fusion",
    "severity_cross_modal_gate": "severity x cross-modal gate around another fusion",
    "drfuse": "DrFuse, shared and distinct features weighed for every label",
    "drifa": "DRIFA-Net",
    "bayesian_unet": "Bayesian U-Net of one image",
}
_DRAWN: dict[Scope, str] = {"full": "all of its dropout", "head": "the dropout of its projections alone"}


def model_card(
    config: ModelConfig, schema: DataSchema, num_parameters: int, scope: Scope = "full", trained: Collection[str] | None = None
) -> str:
    """Markdown text; nothing in it depends on a subject.

    scope: what the model's passes draw anew. trained: the sites of its training studies, where they are known; a release has others
    too, which it holds out.
    """
    modalities = "\n".join(f"| {spec.name} | {spec.kind} | {_size(spec)} |" for spec in schema.modalities)
    return f"""# {_LABELS[config.kind]}: {schema.label.name}

- Predicts **{schema.label.name}** {_asked(schema.label)}: {", ".join(schema.label.outputs)}.
- {num_parameters:,} parameters. {_sites(schema, trained)}
- {_needed(config, schema)}

| modality | kind | size |
|---|---|---|
{modalities}

## Use
Inputs are normalised with `stats.json` (fitted on the training split) and predictions are the mean of the
{_link(schema.label)} over at least 30 Monte-Carlo passes, each of which draws anew {_DRAWN[scope]} (`mc_scope: {scope}`).
`draf_dist.models.export.load_model(folder)` gives the model, its schema and its statistics; the files
hold no code and no pickle. Figures of merit, calibration and robustness stand in the report of the run that made this model.

## Limits
For research. Not a medical device, and not evaluated at sites other than those of its report. Weights of modalities say what the
model relied on, not what caused the outcome. Probabilities need temperature scaling on data of the place of use.
"""


def _sites(schema: DataSchema, trained: Collection[str] | None) -> str:
    if trained is None:
        return f"Sites of its release, held out or not: {', '.join(schema.sites)}."
    held_out = [site for site in schema.sites if site not in trained]
    also = f" Not trained on, though in its release: {', '.join(held_out)}." if held_out else ""
    return f"Trained on {len(trained)} site(s): {', '.join(trained)}.{also}"


def _link(task: TaskSpec) -> str:
    return "softmax" if link_of(task).exclusive else "sigmoid"


def _needed(config: ModelConfig, schema: DataSchema) -> str:
    if isinstance(config, BayesianUnetConfig):
        return f"Reads {config.image_of(schema).name} alone, which must be present."
    return "Any modality may be absent; at least one must be present."


def _asked(task: TaskSpec) -> str:
    match task:
        case MultiLabelSpec():
            return "as any of"
        case SurvivalSpec():
            return "by the hazard of each interval"
        case SegmentationSpec():
            return f"in every voxel of {task.modality} as one of"
    return "as one of"


def _size(spec: ModalitySpec) -> str:
    if spec.kind == "image":
        return f"{spec.channels} x {spec.height} x {spec.width}"
    if spec.kind == "volume":
        sides, spacing = (" x ".join(f"{value:g}" for value in values) for values in (spec.delivered, spec.spacing_mm))
        return f"{spec.channels} x {sides} of {spacing} mm"
    codes = category_counts(spec)
    named = f" (categorical: {', '.join(f'{name}, {count} categories' for name, count in codes.items())})" if codes else ""
    grid = f", {spec.num_steps} steps of {spec.step_h:g} h" if spec.kind == "series" else ""
    return f"{len(spec.variables)} variables{named}{grid}"
