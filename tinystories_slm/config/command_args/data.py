"""Options of the commands that prepare data, beside those of a run."""

import re
from dataclasses import dataclass

from tinystories_slm.config.run_config import RunConfig
from tinystories_slm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DownloadArgs(RunConfig):
    """Write the stories of `data.source` to `data.data_dir`/raw, or list the named sets."""

    list: bool = False
    """Print the named sets that `data.source` takes, with repository, revision, files and license."""


@dataclass(frozen=True, kw_only=True)
class PrepareArgs(RunConfig):
    """Write the token files of `data.source` to `data.data_dir`, at once or in shards on several machines."""

    shard: str | None = None
    """RANK/WORLD: write only part RANK (0 to WORLD - 1) of WORLD parts, to `data.data_dir`/shards; null for
    the token files themselves."""
    merge_shards: int | None = None
    """Write the token files from this number of shards, and remove the shards. null for no merge."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge_shards is not None and self.merge_shards < 1:
            raise UserError(f"merge_shards ({self.merge_shards}): must be at least 1; use WORLD of --shard")
        if self.shard is None:
            return
        if self.merge_shards is not None:
            raise UserError(
                f"merge_shards ({self.merge_shards}): cannot be combined with shard; run it after all shards"
            )
        rank, num_shards = self.rank_and_world
        if not rank < num_shards:
            raise UserError(
                f"shard ({self.shard}): must be RANK/WORLD with RANK below WORLD; use 0/4 to 3/4 for 4 shards"
            )

    @property
    def rank_and_world(self) -> tuple[int, int]:
        """Rank and number of shards; (0, 0) if `shard` is not of the form RANK/WORLD."""
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", self.shard or "")
        return (int(match[1]), int(match[2])) if match else (0, 0)
