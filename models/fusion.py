"""Multi-stage fusion of the video tokens of all global blocks, section 3.3 and figure 3."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from models.config import UniFormerV2Config
from models.drop import linear_rates, own_streams
from models.global_block import GlobalUniBlock


class Fusion(nn.Module):
    """The global blocks and their zero-initialised queries; subclasses define how they are combined.

    `forward` takes the tokens after each of `config.global_layers`, B T 1+N C, and the streams of
    `mask_streams`, B layers, which only training needs. It returns the video token, B C.
    """

    def __init__(self, config: UniFormerV2Config, query_count: int | None = None) -> None:
        """query_count: learnable queries; None for one per global block."""
        super().__init__()
        rates = linear_rates(config.global_drop_path, len(config.global_layers))
        self.blocks = nn.ModuleList([GlobalUniBlock(config, rate) for rate in rates])
        count = len(config.global_layers) if query_count is None else query_count
        self.query = nn.Parameter(torch.zeros(1, count, config.width))

    def _queries(self, batch: int) -> list[Tensor]:  # each B 1 C
        return list(self.query.expand(batch, -1, -1).split(1, dim=1))


class Sequential(Fusion):
    """(a) The video token of one block is the query of the next. The paper's default."""

    def __init__(self, config: UniFormerV2Config) -> None:
        super().__init__(config, query_count=1)

    def forward(self, features: Sequence[Tensor], streams: Tensor | None = None) -> Tensor:
        (token,) = self._queries(features[0].shape[0])
        for block, tokens in zip(self.blocks, features, strict=True):
            token = block(token, tokens, own_streams(block, streams))
        return token.squeeze(1)


class Parallel(Fusion):
    """(b) Each block has its own query; the video tokens are concatenated and projected."""

    def __init__(self, config: UniFormerV2Config) -> None:
        super().__init__(config)
        self.project = nn.Linear(len(config.global_layers) * config.width, config.width, bias=False)

    def forward(self, features: Sequence[Tensor], streams: Tensor | None = None) -> Tensor:
        queries = self._queries(features[0].shape[0])
        stages = zip(self.blocks, queries, features, strict=True)
        video_tokens = [block(query, tokens, own_streams(block, streams)) for block, query, tokens in stages]
        return self.project(torch.cat(video_tokens, dim=-1)).squeeze(1)


class HierarchicalKV(Fusion):
    """(c) Each block has its own query; the previous video token is an additional context token."""

    def forward(self, features: Sequence[Tensor], streams: Tensor | None = None) -> Tensor:
        token: Tensor | None = None
        queries = self._queries(features[0].shape[0])
        for block, query, tokens in zip(self.blocks, queries, features, strict=True):
            token = block(query, tokens, own_streams(block, streams), context=token)
        assert token is not None  # a fusion has at least one block
        return token.squeeze(1)


class HierarchicalQ(Fusion):
    """(d) Each block adds its own query to the video tokens so far and updates all of them.

    The paper does not define how the final tokens become one; here it is their mean.
    """

    def forward(self, features: Sequence[Tensor], streams: Tensor | None = None) -> Tensor:
        queries = self._queries(features[0].shape[0])
        video_tokens = queries[0][:, :0]  # B 0 C
        for block, query, tokens in zip(self.blocks, queries, features, strict=True):
            queries_so_far = torch.cat([video_tokens, query], dim=1)
            video_tokens = block(queries_so_far, tokens, own_streams(block, streams))
        return video_tokens.mean(dim=1)


_KINDS: Mapping[str, Callable[[UniFormerV2Config], Fusion]] = {
    "sequential": Sequential,
    "parallel": Parallel,
    "hierarchical_kv": HierarchicalKV,
    "hierarchical_q": HierarchicalQ,
}


def create_fusion(config: UniFormerV2Config) -> Fusion:
    """The fusion `config.fusion` with its global blocks."""
    return _KINDS[config.fusion](config)
