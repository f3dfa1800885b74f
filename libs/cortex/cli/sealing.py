"""Commands about data sets that are sealed: nobody reads them but the workers that train on them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cortex.cli.common import DirOption, JsonOption, console, example, open_client, print_json, say
from cortex_common.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError
from cortex_common.ids import DEFAULT_ORG

if TYPE_CHECKING:
    from cortex.shipping import Cut
    from cortex_common.data.loading import Dataset

_KEY_FILE_KEYS = {"dataset", "key_id", "key"}
_SUFFIX = ".datakey"
DataKeyOption = Annotated[
    Path | None,
    typer.Option(
        "--data-key", metavar="FILE", help="Where the data set's key is; NAME.datakey by default.", show_default=False
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to `cortex data`."""
    lines = (
        "cortex data seal ward-7 ward.npz --shards 8 --key ~/alice.key",
        "cortex data seal shapes arrays/ --shards 4 --key ~/alice.key --deal dirichlet --alpha 0.3",
    )
    app.command(epilog=example(*lines))(seal)
    app.command(epilog=example("cortex data add ward-7.sealed --org hospital-a"))(add)
    app.command("sealed", epilog=example("cortex data sealed"))(list_sealed)
    app.command(epilog=example("cortex data remove sealed:ward-7@3f2a…"))(remove)


def seal(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to call it.")],
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="An .npz with arrays x and y, a folder with x.npy and y.npy, or a name of `cortex data list`.",
        ),
    ],
    shards: Annotated[int, typer.Option("--shards", min=1, max=256, help="As many workers can train on it, or fewer.")],
    key: Annotated[Path, typer.Option("--key", metavar="FILE", help="Sign with this key (`cortex sign --new-key`).")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="NAME.sealed by default.", show_default=False),
    ] = None,
    data_key: DataKeyOption = None,
    deal: Annotated[
        Literal["iid", "dirichlet", "shards"], typer.Option("--deal", help="How examples are dealt to the shards.")
    ] = "iid",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the deal.")] = 0,
    alpha: Annotated[float | None, typer.Option("--alpha", help="Of dirichlet: small means uneven.")] = None,
    classes: Annotated[
        int | None, typer.Option("--classes", min=1, help="Where the labels at hand do not tell.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Seal a data set into shards with a signed manifest. `cortex data add` gives it to a network.

    DIR holds nothing that is readable without the key, which goes to a file of its own, mode 0600: keep it apart.
    """
    from cortex_common.clock import SystemClock
    from cortex_common.data.partition import Partition, partition
    from cortex_common.security.shards import seal_dataset
    from cortex_common.security.signing import SigningKey
    from cortex_common.storage.durable import write_durably

    signer = SigningKey.load(key)
    folder, key_file = output or Path(f"{name}.sealed"), data_key or Path(f"{name}{_SUFFIX}")
    if key_file.exists():
        raise AlreadyExistsError(f"{key_file} exists; a key is never overwritten. --data-key says where to write")
    dataset = _read(name, source, classes)
    parts = partition(dataset.labels, Partition(deal, seed, alpha), shards)
    now = datetime.fromtimestamp(SystemClock().wall_s(), UTC)
    told, made = seal_dataset(name, dataset, parts, signer, folder, now, lambda index: say(f"shard {index} sealed"))
    document = {"dataset": told.reference, "key_id": made.key_id, "key": made.key.hex()}
    write_durably(key_file, json.dumps(document).encode(), mode=0o600)
    if as_json:
        print_json({"reference": told.reference, "folder": str(folder), "data_key": str(key_file)})
        return
    say(f"{folder} holds {shards} sealed shards, {key_file} the key to them. Next: cortex data add {folder}")
    typer.echo(told.reference)


def add(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `cortex data seal` has made.")],
    org: Annotated[str, typer.Option("--org", help="Organisation whose jobs may train on it.")] = DEFAULT_ORG,
    data_key: DataKeyOption = None,
    directory: DirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring the shards to every aggregator of the network, and the key to its coordinator; again does no harm.

    A shard whose upload broke off goes on where it was, now or when the command is given again.
    """
    from cortex.shipping import check_shards, read_manifest

    told = read_manifest(folder)
    check_shards(folder, told)
    key = _read_key(data_key or Path(f"{told.manifest.name}{_SUFFIX}"), told.manifest.key_id)
    with open_client(directory) as client:
        reached = client.add_dataset(
            folder, told, key, org, lambda aggregator, index: say(f"{aggregator}: shard {index}"), _say_cut
        )
    if as_json:
        print_json({"reference": told.reference, "org": org, "aggregators": reached})
        return
    say(f"{len(told.manifest.shards)} shards are at {', '.join(reached)}. Jobs of {org} name it so, as data.train:")
    typer.echo(told.reference)


def list_sealed(directory: DirOption = None, as_json: JsonOption = False) -> None:
    """List the sealed data sets of the network."""
    with open_client(directory) as client:
        found = client.datasets()
    if as_json:
        print_json(found)
        return
    from cortex.cli.tables import table

    shown = table("reference", "org", "examples", "shards", "classes", "added", "by", right=("examples", "shards"))
    for each in found:
        added = "-" if each.added_at is None else f"{each.added_at:%F %T}"
        counts = (f"{each.examples:,}", str(each.shards), str(each.classes))
        shown.add_row(each.reference, each.org, *counts, added, each.added_by)
    console().print(shown)


def remove(
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="As `cortex data sealed` lists it.")],
    directory: DirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Erase the network's key to a data set, so that nobody can open it any more, and then its shards."""
    with open_client(directory) as client:
        dropped = client.remove_dataset(reference)
    if as_json:
        print_json({"reference": reference, "shards_dropped": dropped})
    else:
        typer.echo(f"{reference}: its key is erased, and {dropped} shards are gone from the aggregators")


def _say_cut(aggregator: str, cut: Cut) -> None:
    """Tell that an upload goes on in the middle of a shard."""
    why = f"{cut.reason}, " if cut.reason else ""
    held, whole = (f"{size / 1e6:,.1f}" for size in (cut.held_bytes, cut.size_bytes))
    say(f"{aggregator}: shard {cut.index}: {why}going on at {held} of {whole} MB")


def _read(name: str, source: str, classes: int | None) -> Dataset:
    """The data set to seal."""
    from cortex_common.data.catalogue import known_datasets
    from cortex_common.data.fashion import default_cache_dir
    from cortex_common.data.files import FileEntry
    from cortex_common.data.loading import load, of_files

    if source in known_datasets():
        return load(source, default_cache_dir())
    path = Path(source).expanduser()
    if not path.is_dir() and path.suffix != ".npz":
        raise NotFoundError(f"{source}: neither an .npz file, nor a folder, nor a name of `cortex data list`")
    inputs, labels = (path / "x.npy", path / "y.npy") if path.is_dir() else (path, path)
    return of_files(FileEntry(name, inputs, labels, classes, source))


def _read_key(path: Path, key_id: str) -> bytes:
    """The data set's key, if the file is its.

    Raises:
        NotFoundError: there is no such file.
        InvalidArgumentError: it holds another data set's key, or none.
    """
    try:
        document = json.loads(path.read_bytes())
        if set(document) != _KEY_FILE_KEYS:
            raise ValueError("allowed are dataset, key_id and key")
        key = bytes.fromhex(document["key"])
    except OSError as error:
        raise NotFoundError(f"{path}: {error.strerror}; --data-key says where the key is") from None
    except (ValueError, TypeError) as error:
        raise InvalidArgumentError(f"{path} holds no key of a data set: {error}") from None
    if document["key_id"] != key_id:
        raise InvalidArgumentError(
            f"{path} holds the key of {document['dataset']}; --data-key says where this one's is"
        )
    return key
