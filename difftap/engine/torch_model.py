"""A backbone's networks as torch modules, which the torch backend runs and the export step traces.

Taps are read with forward hooks on the network's own modules, so no code of a forward pass is copied from its package.
Axis letters are those of `difftap.engine.backend`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from difftap.backbones.checkpoint import Checkpoint
from difftap.errors import ModelError, RecipeError

__all__ = ["ComponentModule", "EncoderModule", "NoisyModule", "TappedModule", "build", "noisy_latent"]


class _Stop(Exception):  # noqa: N818 - a signal, no error
    """Raised by the last tap's hook to end an eager pass: no tap depends on the rest of the network."""


def noisy_latent(
    mean: Tensor, std: Tensor, posterior_noise: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor
) -> Tensor:
    """Sample the posterior for every member and mix in the noise: ``(B, E, C, h, w)``.

    Args:
        mean: of the posterior, ``(B, C, h, w)``.
        std: of the posterior, ``(B, C, h, w)``.
        posterior_noise: standard normal, ``(B, E, C, h, w)``.
        noise: standard normal, ``(B, E, C, h, w)``.
        signal: factor of the latent, ``(B,)`` (`difftap.engine.noise.scales`).
        sigma: factor of the noise, ``(B,)``.
    """
    latent = mean.unsqueeze(1) + std.unsqueeze(1) * posterior_noise  # (B, E, C, h, w)
    return signal.view(-1, 1, 1, 1, 1) * latent + sigma.view(-1, 1, 1, 1, 1) * noise


class ComponentModule(nn.Module):
    """A component's network, with parameters named ``<component>.<tensor>``."""

    def __init__(self, checkpoint: Checkpoint, component: str, network: nn.Module) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.component = component
        # Under the component's name, because the export step finds weights in the checkpoint's files by that name.
        self.add_module(component, network)

    @property
    def network(self) -> nn.Module:
        """The backbone's own module."""
        return self.get_submodule(self.component)

    @property
    def entrance(self) -> nn.Module:
        """The module at which inputs are cast to half precision."""
        return self.checkpoint.entrance(self.component, self.network)


class EncoderModule(ComponentModule):
    """A network from an image to the posterior of its latent."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Encode ``(B, 3, H, W)`` in [-1, 1] as mean and standard deviation, each ``(B, C, h, w)``."""
        return self.checkpoint.encode(self.network, image)


class TappedModule(ComponentModule):
    """A network that returns its taps for an image.

    Args:
        checkpoint: whose network.
        network: the tapped component, loaded.
        taps: ``(name, module path)`` of each tap, in the order of the outputs.
        stop_early: end the pass once every tap has been read. For eager runs: a traced pass must run to its end, and
            the export step then removes what no tap depends on.
    """

    def __init__(
        self, checkpoint: Checkpoint, network: nn.Module, taps: Sequence[tuple[str, str]], stop_early: bool
    ) -> None:
        super().__init__(checkpoint, checkpoint.tapped, network)
        self.taps = tuple(taps)
        self.stop_early = stop_early

    def forward(self, image: Tensor, prompt: Tensor | None = None) -> tuple[Tensor, ...]:
        """Compute ``(B, C, h, w)`` per tap from images ``(B, 3, H, W)`` and a prompt ``(B, T, D)``, if it takes one."""
        return tuple(self.members(image, None, prompt))

    def members(self, given: Tensor, timestep: Tensor | None = None, prompt: Tensor | None = None) -> list[Tensor]:
        """Compute the taps of every ensemble member, from the arguments of `Checkpoint.run`.

        Raises:
            RecipeError: a tapped module is not run, or gives no map.
        """
        caught: dict[str, object] = {}
        handles = []
        paths = list(dict.fromkeys(path for _, path in self.taps))  # two names may mean one module
        for path in paths:

            def catch(_module: nn.Module, _inputs: object, output: object, path: str = path) -> None:
                caught[path] = self.checkpoint.as_map(output, given)
                if self.stop_early and len(caught) == len(paths):
                    raise _Stop

            handles.append(self.network.get_submodule(path).register_forward_hook(catch))
        try:
            self.checkpoint.run(self.network, given, timestep, prompt)
        except _Stop:
            pass
        finally:  # tuning shares one network among several modules: another one's pass must not meet these hooks
            for handle in handles:
                handle.remove()
        found = []
        for name, path in self.taps:
            value = caught.get(path)
            axes = value.ndim if isinstance(value, Tensor) else None
            if not isinstance(value, Tensor) or axes != 4:
                got = "is not run, or gives no tensor" if axes is None else f"gives a tensor of {axes} axes"
                raise RecipeError(
                    f"tap '{name}' cannot be read: module '{path}' {got}; allowed: a module that gives a map "
                    "(B, C, h, w), such as a block, a residual or an attention layer"
                )
            found.append(value)
        return found


class NoisyModule(TappedModule):
    """A tapped network of a backbone with a noise rule; it returns the ensemble mean of its taps."""

    def forward(  # type: ignore[override]
        self,
        mean: Tensor,
        std: Tensor,
        posterior_noise: Tensor,
        noise: Tensor,
        signal: Tensor,
        sigma: Tensor,
        timestep: Tensor,
        prompt: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Compute ``(B, C, h, w)`` per tap from the inputs of `difftap.engine.graph.network_inputs`."""
        batch, members = noise.shape[:2]
        latent = noisy_latent(mean, std, posterior_noise, noise, signal, sigma)
        values = self.members(
            latent.flatten(0, 1),  # (B*E, C, h, w)
            timestep.unsqueeze(1).expand(batch, members).flatten(0, 1),
            None if prompt is None else prompt.unsqueeze(1).expand(-1, members, -1, -1).flatten(0, 1),
        )
        return tuple(value.unflatten(0, (batch, members)).mean(1) for value in values)


def build(
    checkpoint: Checkpoint, component: str, tap_names: Sequence[str] = (), *, stop_early: bool = False
) -> ComponentModule:
    """Load one network of a checkpoint as a module with the inputs and outputs of its graph.

    Args:
        checkpoint: the network's.
        component: one of the checkpoint's components.
        tap_names: the outputs; none for the encoder.
        stop_early: as for `TappedModule`.

    Raises:
        RecipeError: the network has no such tap. (A tap that gives no map is refused when it is run.)
        ModelError: the checkpoint cannot be loaded.
    """
    taps = [checkpoint.tap(name) for name in tap_names]
    network = checkpoint.network(component)
    if component == checkpoint.encoder:
        encoder: ComponentModule = EncoderModule(checkpoint, component, network).eval()
        return encoder
    for tap in taps:
        try:
            network.get_submodule(tap.module)
        except AttributeError as error:
            raise ModelError(
                f"the {component} in '{checkpoint.folder}' has no module '{tap.module}' for tap '{tap.name}'"
            ) from error
    kind = TappedModule if checkpoint.noise_rule is None else NoisyModule
    tapped: ComponentModule = kind(checkpoint, network, [(tap.name, tap.module) for tap in taps], stop_early).eval()
    return tapped
