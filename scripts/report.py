"""Writes report.html of a run: results, curves, lengths, answers side by side, and every token.

    python scripts/report.py --workdir runs/tiny

The page is one file that opens offline; its figures lie in plots/ too. scripts/train.py writes it
at the end of a run; here it can be had while the run goes on, or anew. An --out folder of
scripts/evaluate.py works as well.

Exit codes: 0 done; 1 an unexpected error (with a traceback); 2 bad input.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from opsdc_jax import cli, report
from opsdc_jax.config import InputError


def main(argv: Sequence[str]) -> int:
    """Reads the folder and writes the page."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    args = cli.parse(values, argv)
    if not args.workdir:
        raise InputError("--workdir DIR is required")
    try:
        page = report.write(pathlib.Path(args.workdir))
    except OSError as error:
        raise InputError(f"{args.workdir} cannot be written: {error.strerror}") from None
    print(f"wrote {page} ({page.stat().st_size / 1000:,.0f} kB)")
    return cli.EXIT_DONE


if __name__ == "__main__":
    sys.exit(cli.run(main))
