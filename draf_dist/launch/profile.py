"""Where a job runs: one process, or the workers of a Ray cluster. The job, its run folder and its result stay the same."""

from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator, model_validator

from draf_dist.config.spec import Spec
from draf_dist.errors import SpecError, explain
from draf_dist.launch.cores import decode_threads_of
from draf_dist.training.deepspeed_config import DeepSpeedConfig
from draf_dist.training.torch_engine import OneProcess


class OneProcessProfile(Spec):
    """This process. auto takes a CUDA device if there is one. accumulation: micro-batches per step, where a batch does not fit.

    threads: what one operator uses. decode_threads: what decodes samples; None takes as many as there are cores, at most 16.
    activation_checkpointing: blocks of the model are computed again in backward instead of kept.
    """

    kind: Literal["one_process"] = "one_process"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(1, ge=1)
    decode_threads: int | None = Field(None, ge=1)
    accumulation: int = Field(1, ge=1)
    activation_checkpointing: bool = False

    def backend(self) -> OneProcess:
        """The place to compute.

        Raises:
            SpecError: it asks for a CUDA device and there is none.
        """
        found = torch.cuda.is_available()
        if self.device == "cuda" and not found:
            remedy = "Use `device: auto` or `cpu`."
            raise SpecError(explain("profile: device", expected="a CUDA device", found="none", remedy=remedy))
        device = torch.device("cpu" if self.device == "cpu" or not found else "cuda")
        decode_threads = self.decode_threads or decode_threads_of(1)
        checkpointing = self.activation_checkpointing
        return OneProcess(
            self.threads, self.accumulation, device, decode_threads=decode_threads, activation_checkpointing=checkpointing
        )


class RayProfile(Spec):
    """Workers of a Ray cluster, one rank each, with DeepSpeed.

    min_workers: a run goes on with so many where nodes are lost, and starts where not all are there; it takes more, up to
    `workers`, as nodes come. None: always exactly `workers`. resize_pause_s: so long a number is kept before more are taken up.
    address: None starts a cluster on this machine for as long as the command runs; `auto` or host:port joins one that exists, from
    one of its nodes. cpus_per_worker: what Ray sets aside for a worker, which may be a fraction; threads: what one operator uses.
    decode_threads: what decodes samples; None takes the cores of a node divided by its workers, at least 1 and at most 16.
    gpus_per_worker: 0 computes on CPUs over gloo, 1 on GPUs over NCCL. max_failures: how often in a row, without a new checkpoint
    in between, the workers are started again after one was lost. collective_timeout_s: how long a rank waits for the others before
    it takes them for lost; longer than anything that one rank does alone (uploading a checkpoint). nodes_timeout_s: how long to
    wait for nodes that an autoscaler brings.
    """

    kind: Literal["ray"] = "ray"
    workers: int = Field(2, ge=1)
    min_workers: int | None = Field(None, ge=1)
    resize_pause_s: float = Field(120.0, ge=0)
    address: str | None = None
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: int = Field(0, ge=0, le=1)
    threads: int = Field(1, ge=1)
    decode_threads: int | None = Field(None, ge=1)
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    max_failures: int = Field(3, ge=0)
    collective_timeout_s: int = Field(600, ge=1)
    nodes_timeout_s: float = Field(0.0, ge=0)

    @field_validator("address")
    @classmethod
    def _of_a_node(cls, address: str | None) -> str | None:
        if address is None or address == "auto":
            return address
        host, _, port = address.rpartition(":")
        if "://" in address or not host or not port.isdecimal():
            raise ValueError("expected auto or host:port of the cluster's head; the command itself runs on one of its nodes")
        return address

    @model_validator(mode="after")
    def _least_and_most(self) -> "RayProfile":
        if self.least > self.workers:
            raise ValueError(f"min_workers: expected at most workers, {self.workers}")
        return self

    @property
    def least(self) -> int:
        """The fewest workers that a start is worth."""
        return self.workers if self.min_workers is None else self.min_workers

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray sets aside for one worker."""
        return {"CPU": self.cpus_per_worker, **({"GPU": float(self.gpus_per_worker)} if self.gpus_per_worker else {})}


Profile = OneProcessProfile | RayProfile
# Every kind of profile; AnyProfile is the same for schemas, which say by `kind` which one is meant.
PROFILES: dict[str, type[Profile]] = {"one_process": OneProcessProfile, "ray": RayProfile}
AnyProfile = Annotated[Profile, Field(discriminator="kind")]
