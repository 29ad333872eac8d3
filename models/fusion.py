"""Multi-stage fusion of the video tokens of all global blocks, section 3.3 and figure 3."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from models.config import UniFormerV2Config
from models.drop import linear_rates, own_streams
from models.global_block import GlobalUniBlock

_QUERY_STD = 0.02  # of several queries, as of the class tokens of ViTs that are trained from scratch


class Fusion(nn.Module):
    """The global blocks and their queries; subclasses define how they are combined.

    A set has Q = `config.global_queries` queries. With Q = 1 they are zero-initialised, as in the paper. Q
    equal queries would receive equal gradients and stay equal, so more are random with mean zero: the video
    token, their mean, is zero in a new model as well.

    `forward` takes the tokens after each of `config.global_layers`, B T 1+N C, and the streams of
    `mask_streams`, B layers, which only training needs. It returns the video token, B C: the mean of the Q
    tokens, which the paper does not define (table 14).
    """

    def __init__(self, config: UniFormerV2Config, query_sets: int | None = None) -> None:
        """query_sets: sets of learnable queries; None for one per global block."""
        super().__init__()
        rates = linear_rates(config.global_drop_path, len(config.global_layers))
        self.blocks = nn.ModuleList([GlobalUniBlock(config, rate) for rate in rates])
        sets = len(config.global_layers) if query_sets is None else query_sets
        self._queries_per_set = config.global_queries
        self.query = nn.Parameter(_initial_queries(sets, config.global_queries, config.width))

    def _queries(self, batch: int) -> list[Tensor]:  # each B Q C
        return list(self.query.expand(batch, -1, -1).split(self._queries_per_set, dim=1))


def _initial_queries(sets: int, per_set: int, width: int) -> Tensor:  # 1 sets*per_set width
    if per_set == 1:
        return torch.zeros(1, sets, width)
    drawn = _QUERY_STD * torch.randn(sets, per_set, width)
    return (drawn - drawn.mean(dim=1, keepdim=True)).view(1, sets * per_set, width)


class Sequential(Fusion):
    """(a) The video tokens of one block are the queries of the next. The paper's default."""

    def __init__(self, config: UniFormerV2Config) -> None:
        super().__init__(config, query_sets=1)

    def forward(self, features: Sequence[Tensor], streams: Tensor | None = None) -> Tensor:
        (token,) = self._queries(features[0].shape[0])
        for block, tokens in zip(self.blocks, features, strict=True):
            token = block(token, tokens, own_streams(block, streams))
        return token.mean(dim=1)


class Parallel(Fusion):
    """(b) Each block has its own queries; the video tokens are concatenated and projected."""

    def __init__(self, config: UniFormerV2Config) -> None:
        super().__init__(config)
        self.project = nn.Linear(len(config.global_layers) * config.width, config.width, bias=False)

    def forward(self, features: Sequence[Tensor], streams: Tensor | None = None) -> Tensor:
        queries = self._queries(features[0].shape[0])
        stages = zip(self.blocks, queries, features, strict=True)
        video_tokens = [block(query, tokens, own_streams(block, streams)) for block, query, tokens in stages]
        return self.project(torch.cat(video_tokens, dim=-1)).mean(dim=1)


class HierarchicalKV(Fusion):
    """(c) Each block has its own queries; the previous video tokens are additional context tokens."""

    def forward(self, features: Sequence[Tensor], streams: Tensor | None = None) -> Tensor:
        token: Tensor | None = None
        queries = self._queries(features[0].shape[0])
        for block, query, tokens in zip(self.blocks, queries, features, strict=True):
            token = block(query, tokens, own_streams(block, streams), context=token)
        assert token is not None  # a fusion has at least one block
        return token.mean(dim=1)


class HierarchicalQ(Fusion):
    """(d) Each block adds its own queries to the video tokens so far and updates all of them.

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
