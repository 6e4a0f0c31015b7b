"""How a model is spread over processes: by data, by slices of its parameters, or both; and what of a value is here.

Data-parallel processes see different tokens of one batch, and average their gradients. Tensor-parallel ones see the same
tokens, whole or in parts, and hold slices of the parameters. Every ratio of sums over processes is right whichever it is,
for each token is counted equally often; what is not a ratio needs what is known here.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn.parallel import DistributedDataParallel

from probes.manifest import RunError
from probes.pipeline import Stage

try:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
except ImportError:  # pragma: no cover
    FSDPModule = FullyShardedDataParallel = ()


def local(x: Tensor) -> Tensor:
    """What this process holds of a tensor: of a DTensor its own part, [..] as it lies here.

    Raises RuntimeError for a part of a sum that has not been summed yet: nothing can be told from it.
    """
    if not isinstance(x, DTensor):
        return x
    if any(isinstance(placement, Partial) for placement in x.placements):
        raise RuntimeError("a tensor is spread over processes as parts of a sum")
    return x._local_tensor


def part_of(mask: Tensor, x: Tensor) -> Tensor:
    """Of a mask [B, T] of whole sequences what this process holds of the DTensor `x` [B, T, ...]."""
    if not isinstance(x, DTensor) or isinstance(mask, DTensor) or x.ndim < 3 or x.shape[:2] != mask.shape:
        return local(mask)
    for dim, placement in enumerate(x.placements):
        if placement.is_shard() and placement.dim < 2:
            whole = -(
                -mask.shape[placement.dim] // x.device_mesh.size(dim)
            )  # as DTensor cuts: all but the last alike
            parts = mask.split(whole, placement.dim)
            place = x.device_mesh.get_local_rank(dim)
            mask = parts[place] if place < len(parts) else mask.narrow(placement.dim, 0, 0)
    return mask


def is_split(x: Tensor, given: list[torch.Size], copies: int) -> bool:
    """Whether this process holds a part of `x` [B, T, ...] that others complete: a shard, or fewer tokens than the model was
    `given` ([B, T] of its inputs), which `copies` processes see."""
    if isinstance(x, DTensor):
        return any(placement.is_shard() for placement in x.placements)
    shape = (x.shape[0], x.shape[1] * copies) if x.ndim > 2 else ()
    return copies > 1 and any(shape == tuple(each) for each in given)


def reshard(root: nn.Module) -> None:
    """Let go of parameters that a forward has brought together, and left so for a backward pass that will not come."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_let_go(x: Tensor) -> bool:
    """Whether the memory of a tensor was given back, as that of parameters which were brought together for a forward."""
    return bool(x.numel()) and not isinstance(x, DTensor) and x.untyped_storage().size() == 0


def judge_wrappers(model: object) -> None:
    """Raises RunError for a model in a wrapper that cannot be followed."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    if any(isinstance(module, FullyShardedDataParallel) for module in modules):
        raise RunError(
            "FullyShardedDataParallel shows no parameter whole, and cannot be recorded: use fully_shard, which followed it."
        )
    if any(hasattr(parameter, "_st_info") for module in modules for parameter in module.parameters(False)):
        raise RunError(
            "DistributedDataParallel over a model with DTensors makes new parameters in each forward, which neither an "
            "optimizer nor a recorder can follow: use fully_shard."
        )


def is_parallel(module: nn.Module) -> bool:
    """Whether a module works on DTensors."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def parts_of(module: nn.Module) -> int:
    """Over how many processes the parameters of a module are spread, 1 where each has all."""
    return max((p.device_mesh.size() for p in module.parameters() if isinstance(p, DTensor)), default=1)


class Parallel:
    """Of the model of one recording, among `world` processes. `model` is what the user handed over, `root` what is in it;
    of a pipeline it is one `stage`. `first` is the rank that tells of what all hold that train the same layers."""

    def __init__(self, model: nn.Module, root: nn.Module, rank: int, world: int, stage: Stage | None = None):
        self.rank, self.world, self.first = rank, world, 0
        self._stage = stage
        self._team = 1 if stage is None else stage.processes  # that hold one model together
        self._root = root
        self._tells: dict[tuple, bool] = {}
        self._ddp = _wrapper(model)
        self._fsdp = [module for module in root.modules() if isinstance(module, FSDPModule)]

    @classmethod
    def of(cls, model: nn.Module, root: nn.Module, stage: Stage | None = None) -> "Parallel | None":
        """None where nobody else trains."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        if dist.get_world_size() == 1 and (stage is None or stage.count == 1):
            return None
        return cls(model, root, dist.get_rank(), dist.get_world_size(), stage)

    @property
    def known(self) -> bool:
        """Whether torch averages the gradients, or none need be: nothing else tells what becomes of them."""
        alone = self._stage is not None and self.world == self._team
        return alone or self._ddp is not None or any(isinstance(p, DTensor) for p in self._root.parameters())

    def look(self) -> None:
        """Within a forward: is there a DistributedDataParallel around the model that nobody has shown?"""
        around = DistributedDataParallel._active_ddp_module
        if self._ddp is None and around is not None and any(m is self._root for m in around.modules()):
            self._ddp = around

    @property
    def data(self) -> int:
        """How many processes see different sequences, and have their gradients averaged."""
        if self._fsdp:
            return max(_data_of(module) for module in self._fsdp)
        if self._ddp is not None:
            return torch.distributed.get_world_size(self._ddp.process_group)
        return 1 if self.known else self.world // self._team

    @property
    def divisor(self) -> float:
        """By what the gradient of a process's loss is divided in the gradient that the optimizer takes, or that of the loss of
        one micro-batch in a pipeline."""
        factors = [
            _state(module).gradient_divide_factor for module in self._fsdp if _state(module) is not None
        ]
        found = next((factor for factor in factors if factor is not None), self.data)
        return found if self._stage is None else found * self._stage.factor

    @property
    def copies(self) -> int:
        """How many processes see the same sequence."""
        return max(self.world // (self.data * self._team), 1)

    @property
    def holds_back(self) -> bool:
        """Whether gradients are being kept where nobody sees them, until a later backward pass (FSDP2 without sync)."""
        groups = [_state(module) for module in self._fsdp if _state(module) is not None]
        return any(not (group.reduce_grads and group.all_reduce_grads) for group in groups)

    def tells_of(self, tensor: Tensor) -> bool:
        """Whether this process tells of its part of a parameter, or of a gradient; another one does that holds the same, where
        not."""
        if not isinstance(tensor, DTensor):
            return self.rank == self.first
        mesh, placements = tensor.device_mesh, tensor.placements
        if (mesh, placements) not in self._tells:
            places = zip(mesh.get_coordinate() or (), placements, strict=False)
            copy = any(place and isinstance(each, Replicate) for place, each in places)
            self._tells[mesh, placements] = not copy and self._of_first(mesh)
        return self._tells[mesh, placements]

    def whole(self, parameter: nn.Parameter) -> bool:
        """Whether the gradient of a parameter may be left as parts of a sum, one in each process: that of one which all hold
        whole, and each uses for a part of the tokens."""
        return (
            not self._fsdp
            and isinstance(parameter, DTensor)
            and all(isinstance(each, Replicate) for each in parameter.placements)
        )

    def part(self, gradient: Tensor | None, parameter: nn.Parameter) -> Tensor:
        """What this process adds to the gradient of such a parameter, flat."""
        here = local(parameter)
        if gradient is None or not self._of_first(parameter.device_mesh):
            return torch.zeros(here.numel(), device=here.device)
        summed = [isinstance(each, Partial) for each in gradient.placements]
        places = zip(parameter.device_mesh.get_coordinate() or (), summed, strict=False)
        if any(place and not parts for place, parts in places):
            return torch.zeros(here.numel(), device=here.device)  # another one tells of it
        return gradient._local_tensor.detach().reshape(-1).float().clone()

    def describe(self) -> dict:
        """In JSON, for run.json."""
        wrappers = ["DistributedDataParallel"] * (self._ddp is not None) + ["fully_shard"] * bool(self._fsdp)
        meshes = {
            (tuple(p.device_mesh.shape), tuple(p.device_mesh.mesh_dim_names or ()))
            for p in self._root.parameters()
            if isinstance(p, DTensor)
        }
        told = [{"shape": list(shape), "names": list(names)} for shape, names in sorted(meshes)]
        stages = {} if self._stage is None else {"stages": self._stage.count}
        return {"by": wrappers, "data": self.data, "meshes": told} | stages

    def _of_first(self, mesh: DeviceMesh) -> bool:
        """Whether the first rank is among those of a mesh, of which there may be several like it."""
        return bool((mesh.mesh == self.first).any())


def _wrapper(model: nn.Module) -> DistributedDataParallel | None:
    while not isinstance(model, DistributedDataParallel):
        model = getattr(model, "_orig_mod", None)
        if model is None:
            return None
    return model


def _state(module: nn.Module):
    """FSDP2's group of the parameters of one module, None where it has none of its own."""
    return module._get_fsdp_state()._fsdp_param_group


def _data_of(module: nn.Module) -> int:
    group = _state(module)
    if group is None:
        return 1
    mesh = group.mesh_info
    return getattr(mesh, "shard_mesh_size", 1) * getattr(mesh, "replicate_mesh_size", 1)
