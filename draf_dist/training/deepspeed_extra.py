"""Keys that a profile may pass on to DeepSpeed: how it moves and logs what it computes, never what.

The names are DeepSpeed's own (https://www.deepspeed.ai/docs/config-json/). Each one here is tested to leave losses and checkpoints
as they are; what a key of ours sets, or what would change a result or the way back from a checkpoint, is refused and says so.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from draf_dist.config.spec import Spec

_REFUSAL = "draf_refused"
_UNTESTED = "it is not tested whether results and checkpoints stay as they are"
# Why a key of DeepSpeed's may not be passed on.
_ZERO_REFUSED = {
    "stage": "deepspeed.zero_stage sets it",
    "offload_optimizer": "deepspeed.offload sets it",
    "offload_param": "deepspeed.offload sets it",
    "cpu_offload": "deepspeed.offload sets it",
    "cpu_offload_param": "deepspeed.offload sets it",
    "cpu_offload_use_pin_memory": "deepspeed.offload sets it",
    "round_robin_gradients": "checkpoints could not be put together again: it lays the optimizer's state out in another order",
    "zenflow": "it changes results",
    "zero_quantized_weights": "it changes results",
    "zero_quantized_nontrainable_weights": "it changes results",
    "zero_quantized_gradients": "it changes results",
    "compute_grad_norm": "every step reports its gradient norm",
    "ignore_unused_parameters": "a parameter that no loss reaches is always refused",
    "load_from_fp32_weights": "checkpoints are the run folder's own",
    "elastic_checkpoint": "checkpoints are the run folder's own",
    "stage3_gather_16bit_weights_on_model_save": "model/ is written from the run folder's checkpoints",
    "stage3_gather_fp16_weights_on_model_save": "model/ is written from the run folder's checkpoints",
    "pipeline_loading_checkpoint": "checkpoints are the run folder's own",
    "save_muon_momentum_buffer_in_memory": "the optimizer is always torch's AdamW",
    "legacy_stage1": "DeepSpeed has no such stage any more",
    "zero_hpz_partition_size": _UNTESTED,
    "parameter_alignment": _UNTESTED,
    "memory_efficient_linear": _UNTESTED,
    "override_module_apply": _UNTESTED,
    "leaf_module": _UNTESTED,
    "stage3_module_granularity_threshold": _UNTESTED,
    "enable_sanity_checks": _UNTESTED,
}
_ROWS_ONLY = "ranks share out rows of the batch and nothing else"
_REFUSED = {
    "train_batch_size": "the job's batch_size sets it",
    "train_micro_batch_size_per_gpu": "it follows from the job's batch_size, the workers and deepspeed.accumulation",
    "gradient_accumulation_steps": "deepspeed.accumulation sets it",
    "managed_gradient_accumulation": "deepspeed.accumulation sets it",
    "gradient_clipping": "the job's optimizer.clip_norm sets it",
    "optimizer": "the job's optimizer sets it",
    "scheduler": "the job's optimizer.warmup_fraction and epochs set it",
    "zero_allow_untested_optimizer": "the optimizer is always torch's AdamW",
    "zero_force_ds_cpu_optimizer": "the optimizer is always torch's AdamW",
    "fp16": "deepspeed.precision sets it, to fp32 or bf16",
    "bf16": "deepspeed.precision sets it",
    "bfloat16": "deepspeed.precision sets it",
    "torch_autocast": "deepspeed.precision sets it",
    "amp": "deepspeed.precision sets it",
    "data_types": "deepspeed.precision sets it",
    "communication_data_type": "gradients are summed in fp32, or results would change",
    "prescale_gradients": "it changes results",
    "gradient_predivide_factor": "it changes results",
    "gradient_allreduce_op": "losses are divided by the global weight already",
    "sparse_gradients": "it changes results",
    "compression_training": "it changes results",
    "quantize_training": "it changes results",
    "weight_quantization": "it changes results",
    "progressive_layer_drop": "it changes results",
    "curriculum_learning": "the job's order of samples is fixed",
    "data_efficiency": "the job's order of samples is fixed",
    "dataloader_drop_last": "the job's order of samples is fixed",
    "elasticity": "the profile's workers set how many ranks there are",
    "activation_checkpointing": "deepspeed.activation_checkpointing sets it",
    "checkpoint": "the job's checkpoint sets it; checkpoints are the run folder's own",
    "nebula": "checkpoints are the run folder's own",
    "datastates_ckpt": "checkpoints are the run folder's own",
    "aio": "nothing is offloaded to disks",
    "seq_parallel_communication_data_type": _ROWS_ONLY,
    "tensor_parallel": _ROWS_ONLY,
    "expert_parallel": _ROWS_ONLY,
    "use_data_before_expert_parallelism": _ROWS_ONLY,
    "pipeline": _ROWS_ONLY,
    "hybrid_engine": "no job generates while it trains",
    "compile": _UNTESTED,
    "graph_harvesting": _UNTESTED,
    "eigenvalue": _UNTESTED,
    "sparse_attention": "the job's model sets its layers",
    "disable_allgather": "DeepSpeed reads it and does nothing with it",
    "disable_python_gc": _UNTESTED,
    "timers": "it times DeepSpeed's own forward, which no step calls",
    "vocabulary_size": "no model has a vocabulary",
    "autotuning": "it would start runs of its own; draf tune tries settings",
    "flops_profiler": "it counts in DeepSpeed's own forward, which no step calls",
    "dump_state": "log_level: info shows DeepSpeed's configuration",
    "tensorboard": "the run folder's tensorboard/ has the losses",
    "wandb": "the run folder's tensorboard/ has the losses",
    "comet": "the run folder's tensorboard/ has the losses",
    "csv_monitor": "the run folder's metrics.jsonl has the losses",
}


def _problem(where: tuple[int | str, ...], found: Any, kind: str, about: dict[str, Any]) -> InitErrorDetails:
    told = PydanticCustomError(_REFUSAL, "can't be passed on: {why}", about) if kind == _REFUSAL else kind
    return InitErrorDetails(type=told, loc=where, input=found, ctx=about)


class PassedOn(Spec):
    """Keys of DeepSpeed's, and why others of it can't be passed on."""

    refused: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="wrap")
    @classmethod
    def _say_why(cls, tree: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(tree, dict):
            return handler(tree)
        known = {key: value for key, value in tree.items() if key not in cls.refused}
        problems = [_problem((key,), tree[key], _REFUSAL, {"why": cls.refused[key]}) for key in tree if key not in known]
        try:
            found = handler(known)
        except ValidationError as error:
            problems += [_problem(each["loc"], each["input"], each["type"], each.get("ctx", {})) for each in error.errors()]
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, problems)
        return found


class ZeroExtra(PassedOn):
    """Part `zero_optimization`: in which portions the ranks exchange gradients and parameters. None leaves it to DeepSpeed.

    Buckets and thresholds count elements, not bytes. Those of stage3_ act with zero_stage 3 only.
    """

    refused: ClassVar[Mapping[str, str]] = _ZERO_REFUSED

    contiguous_gradients: bool | None = None
    reduce_scatter: bool | None = None
    reduce_bucket_size: int | None = Field(None, ge=1)
    use_multi_rank_bucket_allreduce: bool | None = None
    allgather_partitions: bool | None = None
    # An odd one would end in an assertion of DeepSpeed's.
    allgather_bucket_size: int | None = Field(None, ge=2, multiple_of=2)
    overlap_comm: bool | None = None
    sub_group_size: int | None = Field(None, ge=1)
    stage3_prefetch_bucket_size: int | None = Field(None, ge=0)
    stage3_param_persistence_threshold: int | None = Field(None, ge=0)
    stage3_model_persistence_threshold: int | None = Field(None, ge=0)
    stage3_max_live_parameters: int | None = Field(None, ge=0)
    stage3_max_reuse_distance: int | None = Field(None, ge=0)
    stage3_use_all_reduce_for_fetch_params: bool | None = None
    stage3_allgather_sequential: bool | None = None
    log_trace_cache_warnings: bool | None = None


class CommsLogger(Spec):
    """Part `comms_logger`: a line for each collective, or for those in prof_ops, in the log of its rank."""

    enabled: bool = True
    verbose: bool = True
    prof_all: bool = True
    debug: bool = False
    prof_ops: tuple[str, ...] = ()


class DeepSpeedExtra(PassedOn):
    """What goes to DeepSpeed as it is. Its log is that of the worker; below `warning` it says nothing unless log_level asks for it.

    steps_per_print: every how many steps it logs where it stands. wall_clock_breakdown: times of backward and step, waiting for
    the device to have them exactly. memory_breakdown: memory around every step.
    """

    refused: ClassVar[Mapping[str, str]] = _REFUSED

    zero_optimization: ZeroExtra = ZeroExtra()
    comms_logger: CommsLogger | None = None
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    steps_per_print: int | None = Field(None, ge=1)
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = None

    def of_zero(self) -> dict[str, Any]:
        """What is set of `zero_optimization`."""
        return self.zero_optimization.model_dump(mode="json", exclude_none=True)

    def of_engine(self) -> dict[str, Any]:
        """What is set of the rest."""
        return self.model_dump(mode="json", exclude={"zero_optimization"}, exclude_none=True)
