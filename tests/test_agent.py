"""What the project adds to torchrun: files for any number of ranks, a grace that is ours."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed import run

from experiments.agent import Logs, with_grace
from experiments.launch import Torchrun, torchrun_command
from experiments.process import GRACE_S, RANK


@pytest.mark.parametrize("ranks", [1, 2, 12, 64])
@pytest.mark.parametrize("quiet", [False, True])
def test_each_rank_but_the_one_that_is_shown_writes_to_files(
    tmp_path: Path, ranks: int, quiet: bool
) -> None:
    """torchrun itself parses the options, for 16-GPU nodes as well as for a laptop."""
    options = ["--nnodes=4", "--node-rank=3"] if quiet else []
    command = torchrun_command(tmp_path, ranks, Torchrun(options, on_one_machine=quiet))
    arguments = run.parse_args(command[command.index("experiments.agent") + 1 :])
    assert arguments.training_script == RANK or RANK in arguments.training_script_args
    assert int(arguments.nproc_per_node) == ranks
    redirects = run.Std.from_str(arguments.redirects)
    shown = {int(rank) for rank in (arguments.local_ranks_filter or "").split(",") if rank}
    logs = Logs(arguments.log_dir, redirects, local_ranks_filter=shown)
    files = logs.reify({rank: {} for rank in range(ranks)})
    to_terminal = [rank for rank in range(ranks) if not files.stdouts[rank]]
    assert to_terminal == ([] if quiet else [0])
    assert [rank for rank in range(ranks) if not files.stderrs[rank]] == to_terminal
    assert len(set(files.stdouts.values()) | set(files.stderrs.values())) >= 2 * ranks - 1


def test_ranks_get_our_grace_where_this_torchrun_can_be_told() -> None:
    has = "--shutdown-timeout" in run.get_args_parser().format_usage()
    assert with_grace(["a"]) == ([f"--shutdown-timeout={GRACE_S}", "a"] if has else ["a"])
    assert with_grace(["--shutdown_timeout=3", "a"]) == ["--shutdown_timeout=3", "a"]
