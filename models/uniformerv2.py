"""The UniFormerV2 model: clips to logits."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.batch_norm import frozen_running_statistics
from models.config import ModelError, UniFormerV2Config, build_config
from models.drop import Dropout, linear_rates, mask_streams, number_layers, own_streams
from models.fusion import create_fusion
from models.local_block import LocalUniBlock
from models.temporal_modules import TemporalTransformer
from models.vit import PatchEmbedding


class UniFormerV2(nn.Module):
    """UniFormerV2 (arXiv 2211.09552): an image ViT with local and global UniBlocks, figure 2.

    config: the complete description of the model.
    """

    def __init__(self, config: UniFormerV2Config) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embedding = PatchEmbedding(config)
        self.class_token = nn.Parameter(torch.empty(width))
        positions = torch.empty(1 + config.grid**2, width)
        self.position_embedding = nn.Parameter(positions) if config.absolute_positions else None
        self.ln_pre = nn.LayerNorm(width, config.norm_eps) if config.ln_pre else nn.Identity()
        rates = linear_rates(config.drop_path, config.depth)
        self.blocks = nn.ModuleList([LocalUniBlock(config, rate, layer) for layer, rate in enumerate(rates)])
        has_video_token = bool(config.global_layers)
        self.fusion = create_fusion(config) if has_video_token else None
        self.balance = nn.Parameter(torch.zeros(width)) if config.is_balanced else None
        self.head_norm = nn.LayerNorm(width)
        self.head_dropout = Dropout(config.head_dropout)
        self.head = nn.Linear(width, config.num_classes)
        self.temporal_position = _temporal_position(config)
        has_transformer = config.temporal_module == "temporal_transformer"
        self.temporal_transformer = TemporalTransformer(config) if has_transformer else None
        self._mask_layers = number_layers(self)
        self._initialise_embeddings()
        if config.frozen_backbone:
            self._freeze_backbone()

    def _initialise_embeddings(self) -> None:
        scale = self.config.width**-0.5
        nn.init.normal_(self.class_token, std=scale)
        if self.position_embedding is not None:
            nn.init.normal_(self.position_embedding, std=scale)
        fan_in = self.patch_embedding.weight[0].numel()
        nn.init.normal_(self.patch_embedding.weight, std=fan_in**-0.5)

    def _freeze_backbone(self) -> None:
        for part in (self.patch_embedding, self.ln_pre, self.blocks):
            part.requires_grad_(False)
        self.class_token.requires_grad_(False)
        if self.position_embedding is not None:
            self.position_embedding.requires_grad_(False)

    def forward(self, clips: Tensor, keys: Tensor | None = None) -> Tensor:  # B 3 T H W, B -> B K
        """Logits of normalised RGB clips, from the balanced sum Z of section 3.3.

        As in the released implementation, Z = (1 - α) F + α F^C: α weighs the class tokens, not the video
        token. With `config.frame_feature: patch_mean`, F^C is the mean of the patch tokens.

        keys: int64 on the clips' device. In training, a clip's dropout and drop-path masks are a function
        of its key. None draws keys from torch's generator. Ignored in evaluation and if all rates are 0.

        Raises `ModelError` unless the clips have `config.frames` frames of `config.resolution` pixels and
        there is one key per clip.
        """
        self._check(clips)
        streams = self._streams(clips, keys)
        x, features = self._backbone(clips, streams)
        frame_mean = self._frame_features(x).mean(dim=1)  # B C
        if self.fusion is None:
            summary = frame_mean
        elif self.balance is None:
            summary = self.fusion(features, streams)
        else:
            alpha = self.balance.sigmoid()  # C
            summary = (1 - alpha) * self.fusion(features, streams) + alpha * frame_mean
        return self.head(self.head_dropout(self.head_norm(summary), streams))

    def _frame_features(self, x: Tensor) -> Tensor:  # B T 1+N C -> B T C
        """What represents each frame in the head, by `config.frame_feature`."""
        features = x[:, :, 0] if self.config.frame_feature == "class_token" else x[:, :, 1:].mean(dim=2)
        if self.temporal_transformer is None or self.temporal_position is None:
            return features
        return self.temporal_transformer(features + self.temporal_position)

    def _streams(self, clips: Tensor, keys: Tensor | None) -> Tensor | None:
        """The streams of this forward's masks, B layers; None if nothing is dropped."""
        config = self.config
        rates = (config.drop_path, config.global_drop_path, config.global_mlp_dropout, config.head_dropout)
        if not (self.training and any(rates)):
            return None
        if keys is None:
            keys = torch.randint(2**63 - 1, clips.shape[:1], device=clips.device)
        elif keys.shape != clips.shape[:1] or keys.dtype != torch.int64:
            shape = tuple(keys.shape)
            raise ModelError(f"keys are {keys.dtype} {shape}, the model expects one int64 per clip")
        return mask_streams(keys, self._mask_layers)

    def _backbone(self, clips: Tensor, streams: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Tokens after the last block, and after each of the global layers; all B T 1+N C."""
        x = self._embed(clips)
        features = []
        for index, block in enumerate(self.blocks):
            own = own_streams(block, streams)
            x = self._recomputed(block, x, own) if self._recomputes(index) else block(x, own)
            if index in self.config.global_layers:
                features.append(x)
        return x, features

    def _embed(self, clips: Tensor) -> Tensor:  # B 3 T H W -> B T 1+N C
        patches = self.patch_embedding(clips)
        class_tokens = self.class_token.expand(*patches.shape[:2], 1, -1)  # B T 1 C
        tokens = torch.cat([class_tokens, patches], dim=2)
        if self.position_embedding is not None:
            tokens = tokens + self.position_embedding
        return self.ln_pre(self._with_frames(tokens))

    def _with_frames(self, x: Tensor) -> Tensor:  # B T 1+N C -> B T 1+N C, or B 1 1+T*N C
        """Adds what attention over frames needs: temporal positions; of joint MHSA, one group of all
        frames with a single class token, as in TimeSformer."""
        module = self.config.temporal_module
        if module not in ("temporal_mhsa", "joint_mhsa"):
            return x
        assert self.temporal_position is not None
        class_tokens, patches = x[:, :, :1], x[:, :, 1:] + self.temporal_position.unsqueeze(1)
        if module == "joint_mhsa":
            class_tokens, patches = class_tokens[:, :1], patches.flatten(1, 2).unsqueeze(1)
        return torch.cat([class_tokens, patches], dim=2)

    def _recomputes(self, index: int) -> bool:
        is_selected = index < self.config.recomputed_blocks and not self.config.frozen_backbone
        return is_selected and torch.is_grad_enabled()

    @staticmethod
    def _recomputed(block: nn.Module, x: Tensor, streams: Tensor | None) -> Tensor:
        # No block draws from a generator, so no generator state has to be saved.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        # The compiler recomputes only operations without side effects, so running statistics are updated
        # once without a context. This holds inside its graph only: a graph break here would update them
        # twice.
        if not torch.compiler.is_compiling():
            options["context_fn"] = partial(_recomputation_contexts, block)
        return checkpoint(block, x, streams, **options)

    def _check(self, clips: Tensor) -> None:
        if clips.dim() != 5:
            raise ModelError(f"clips have {clips.dim()} dimensions, the model expects 5: B 3 T H W")
        side = self.config.resolution
        expected = {"channels": 3, "frames": self.config.frames, "rows": side, "columns": side}
        for (name, count), given in zip(expected.items(), clips.shape[1:], strict=True):
            if given != count:
                raise ModelError(f"clips have {given} {name}, the model expects {count}")


def _temporal_position(config: UniFormerV2Config) -> nn.Parameter | None:
    """A zero-initialised position of each frame, T' C, for attention over frames, which sees no order
    itself."""
    if config.temporal_module not in ("temporal_mhsa", "joint_mhsa", "temporal_transformer"):
        return None
    return nn.Parameter(torch.zeros(config.inner_frames, config.width))


def _recomputation_contexts(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """The contexts of a block's first run and of its recomputation."""
    return nullcontext(), frozen_running_statistics(block)


def create_model(preset: str, *, form: str, frames: int, num_classes: int, **overrides: Any) -> UniFormerV2:
    """A freshly initialised model; the arguments are those of `build_config`.

    Raises `ModelError` for an unknown name or a value that is not allowed.
    """
    return UniFormerV2(build_config(preset, form=form, frames=frames, num_classes=num_classes, **overrides))
