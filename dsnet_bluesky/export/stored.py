"""From results in the catalog to files: which ones, under which names, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xarray as xr
from tiled.client.utils import ClientError
from tiled.queries import KeysFilter

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.documents import Instrument, failures_of, good_exposures, sample_name
from dsnet_bluesky.questions import OfRun, Question

from .contents import Contents, check_complete, of_result, one_line
from .files import FORMATS, check_folder, check_target, file_name, format_of, write

__all__ = ["Selection", "contents_of", "export", "select"]


@dataclass(frozen=True)
class Selection:
    """Results to export.

    Attributes
    ----------
    complete
        Their clients, by key.
    left_out
        Results that were found too, but hold nothing to export: why, by key.
    """

    complete: dict[str, Any]
    left_out: dict[str, str]


def select(results: Any, names: Sequence[str] = (), questions: Sequence[Question] = ()) -> Selection:
    """Find the results to export.

    Parameters
    ----------
    results
        ``client["desmeared"]``.
    names
        Keys of results, or uids of raw runs, which stand for all results of the run.
    questions
        That the results must answer, in addition to being named.

    Raises
    ------
    BadInput
        If nothing is asked for or found, if a result that is named by its key is not complete, or none of the others is.
    """
    if not names and not questions:
        raise BadInput("Say what to export: keys of results, uids of raw runs, or --query.")
    for question in questions:
        results = results.search(question)
    found = dict(results.items()) if not names else {}
    for name in names:
        found |= _named(results, name, bool(questions))
    if not found:
        raise BadInput("No result answers the query: there is nothing to export.")
    left_out = {key: why for key, node in found.items() if (why := _incomplete(node))}
    if len(left_out) == len(found):
        key, why = next(iter(left_out.items()))
        raise BadInput(f"None of the results that were found ({len(found)}) is complete; {key}: {why}")
    return Selection({key: node for key, node in found.items() if key not in left_out}, left_out)


def _named(results: Any, name: str, narrowed: bool) -> dict[str, Any]:
    found = dict(results.search(KeysFilter([name])).items())
    for node in found.values():
        if why := _incomplete(node):
            raise BadInput(f"{name}: {why}")
    found = found or dict(results.search(OfRun(name)).items())
    if not found:
        query = " that answers the query" if narrowed else ""
        raise BadInput(f"There is no result {name}{query}, nor one of a run of that uid; give the whole key or uid.")
    return found


def _incomplete(node: Any) -> str:
    """Say why a result cannot be exported, empty if it can."""
    try:
        check_complete(node.metadata)
    except BadInput as error:
        return str(error)
    return ""


def contents_of(result: Any, *, psfs: dict[str, xr.Dataset | str] | None = None) -> Contents:
    """Read all that a file tells of a result.

    Parameters
    ----------
    result
        Its client, a `queries.DesmearedClient`.
    psfs
        Where PSFs that were read are kept, by the uid of their run: results share them. Without it no PSF is read.

    Raises
    ------
    BadInput
        If the result is not complete.
    """
    said = dict(result.metadata)
    check_complete(said)
    psf = None if psfs is None else _psf_of(result, said.get("direct_beam_uid"), psfs)
    if isinstance(psf, str):
        said["psf"] = psf  # the reason why it is not there
    return of_result(
        result.read(),
        said,
        key=result.item["id"],
        instrument=_instrument_of(result),
        psf=psf if isinstance(psf, xr.Dataset) else None,
    )


def _instrument_of(result: Any) -> Instrument | None:
    """Return the instrument with which the run's curves are reduced; None where they are not registered."""
    with suppress(KeyError, IndexError, BadInput, ClientError):
        source = result.curves.include_data_sources().data_sources()[0]
        return Instrument.from_configuration({"instrument": {"data": source.parameters["instrument"]}})
    return None


def _psf_of(result: Any, uid: str | None, psfs: dict[str, xr.Dataset | str]) -> xr.Dataset | str | None:
    """Return the PSF, or why the catalog cannot give it: a result may outlive the frames of its direct beam."""
    if not uid:
        return None
    if uid not in psfs:
        try:
            psfs[uid] = result.psf.read()
        except KeyError:
            psfs[uid] = "not exported: it is not in the catalog, or may not be read"
        except ClientError as error:
            psfs[uid] = f"not exported: {one_line(error)}"
    return psfs[uid]


def export(
    selection: Selection, path: Path, format: str | None = None, *, exposure: int | None = None, overwrite: bool = False
) -> Iterator[tuple[Path, int]]:
    """Write results to files, and say of each file which it is and how many results it holds.

    Parameters
    ----------
    selection
        Of `select`.
    path
        A file, if it ends like one (``.h5``): it will hold all results. Else a folder, which is made if need be, with a
        file for each result, or for each exposure where the format holds but one curve.
    format
        A name of `files.FORMATS`; by default what the file's name stands for, else NXcanSAS.
    exposure
        The one of each result that is wanted, from 1; all if not given.
    overwrite
        Replace existing files.

    Raises
    ------
    BadInput
        Before anything is written: if a file is there, cannot be written, or would have to hold several curves and
        cannot, or if a result has no such exposure.
    """
    name = format_of(path, format)
    numbers = {key: _numbers(key, node, exposure) for key, node in selection.complete.items()}
    if path.suffix and not path.is_dir():
        return _export_together(selection, path, name, numbers, exposure, overwrite)
    return _export_apart(selection, path, name, numbers, exposure, overwrite)


def _numbers(key: str, node: Any, exposure: int | None) -> list[int]:
    """Return the numbers of the exposures that will be written, from 1."""
    said = node.metadata
    good = [number + 1 for number in good_exposures(said)]
    if exposure is None:
        return good
    if exposure not in good:
        why = "it failed" if exposure - 1 in failures_of(said) else f"it holds {said['exposures']}, counted from 1"
        raise BadInput(f"The result {key} has no exposure {exposure} to export: {why}.")
    return [exposure]


def _export_together(
    selection: Selection, path: Path, name: str, numbers: dict[str, list[int]], exposure: int | None, overwrite: bool
) -> Iterator[tuple[Path, int]]:
    count = sum(map(len, numbers.values()))
    if not FORMATS[name].many and count > 1:
        raise BadInput(
            f"A file of {name} holds one curve, and {count} are selected: give a folder as --output, name the --exposure, "
            f"or take a format that holds all ({', '.join(known for known, form in FORMATS.items() if form.many)})."
        )
    check_target(path, overwrite=overwrite)
    results = selection.complete.values()
    several = len(results) > 1
    write(_read(results, name), path, name, exposure=exposure, several=several, overwrite=overwrite)
    yield path, len(results)


def _export_apart(
    selection: Selection, folder: Path, name: str, numbers: dict[str, list[int]], exposure: int | None, overwrite: bool
) -> Iterator[tuple[Path, int]]:
    check_folder(folder if folder.is_dir() else folder.absolute().parent)
    form = FORMATS[name]
    files: list[tuple[Path, Any, int | None]] = []
    for key, node in selection.complete.items():
        for number in [exposure] if form.many else numbers[key]:
            files.append((folder / _name_of(key, node, number, form.suffixes[0]), node, number))
    for target, _, _ in files if folder.is_dir() else []:
        check_target(target, overwrite=overwrite)
    folder.mkdir(exist_ok=True)
    psfs: dict[str, xr.Dataset | str] = {}
    for target, node, number in files:
        yield write(_read([node], name, psfs), target, name, exposure=number, overwrite=overwrite), 1


def _read(results: Any, name: str, psfs: dict[str, xr.Dataset | str] | None = None) -> Iterator[Contents]:
    kept = psfs if psfs is not None else {}
    return (contents_of(node, psfs=kept if name == "nxcansas" else None) for node in results)


def _name_of(key: str, node: Any, number: int | None, suffix: str) -> str:
    """Name a file so that it is found again by eye, and the same for every export of a result."""
    said = node.metadata
    method = "-".join(filter(None, (said["method"], said.get("model_version"))))
    numbered = [] if number is None or said["exposures"] == 1 else [f"exposure{number}"]
    return file_name(sample_name(said), method, key, *numbered, suffix=suffix)
