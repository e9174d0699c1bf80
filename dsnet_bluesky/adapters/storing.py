"""A route of the server's that stores many results with one request, at ``/custom/results``.

Tiled's own routes make one node with each request and in a transaction of its own, and most of the time goes into these.
Otherwise all is as there: the same scopes are asked for, the access policy is asked about the tags, subscribers hear of
each node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request, Security
from pydantic import BaseModel, Field
from sqlalchemy.exc import IntegrityError
from tiled.access_control.protocols import normalize_access_tags
from tiled.catalog import orm
from tiled.catalog.adapter import CatalogContainerAdapter, Collision, ContainerChildCreatedEvent, _resolve_access_tags
from tiled.catalog.utils import compute_structure_id
from tiled.server.authentication import (
    check_scopes,
    get_current_access_tags,
    get_current_principal,
    get_current_scopes,
    get_session_state,
)
from tiled.server.dependencies import get_entry, get_root_tree
from tiled.server.schemas import DataSource
from tiled.structures.container import ContainerStructure
from tiled.structures.core import Spec, StructureFamily
from tiled.structures.data_source import Management
from tiled.type_aliases import AccessTags

from dsnet_bluesky.kinds import kind_of
from dsnet_bluesky.nodes import RESULT_MIMETYPE, specs_of

__all__ = ["NewResult", "post_results", "router"]

SCOPES = ["write:metadata", "create:node", "register"]
"""What Tiled asks for who registers a node; see ``POST /register``."""

FORBIDDEN = 403

METHOD_NOT_ALLOWED = 405

router = APIRouter(prefix="/results", tags=["results"])
"""For `routers:` of Tiled's configuration."""


class NewResult(BaseModel):
    """A result whose rows are stored already.

    Attributes
    ----------
    key
        Of its node.
    metadata
        Of its node, complete.
    parameters
        Of its data source: where its rows are, see `ResultAdapter.from_catalog`.
    keys
        Names of its variables.
    access_tags
        Of its node.
    """

    key: Annotated[str, Field(pattern=r"^[^/]+$")]
    metadata: dict[str, Any]
    parameters: dict[str, Any]
    keys: list[str]
    access_tags: list[str] | None = None


@router.post("/{path:path}")
async def post_results(
    path: str,
    body: list[NewResult],
    request: Request,
    principal: Annotated[Any, Depends(get_current_principal)],
    root_tree: Annotated[Any, Depends(get_root_tree)],
    session_state: Annotated[dict[str, Any], Depends(get_session_state)],
    authn_access_tags: Annotated[Any, Depends(get_current_access_tags)],
    authn_scopes: Annotated[Any, Depends(get_current_scopes)],
    _: Annotated[Any, Security(check_scopes, scopes=SCOPES)],
) -> dict[str, list[str]]:
    """Make a node for each result in the container at `path`; answer with the keys of which there was a node already."""
    policy = getattr(request.app.state, "access_policy", None)
    who = (principal, authn_access_tags, authn_scopes)
    parent = await get_entry(path, SCOPES, *who, root_tree, session_state, request.state.metrics, None, policy)
    if not isinstance(parent, CatalogContainerAdapter) or RESULT_MIMETYPE not in parent.context.adapters_by_mimetype:
        raise HTTPException(METHOD_NOT_ALLOWED, f"No results can be stored at {path}.")
    tags = {result.key: await _allowed_tags(policy, who, result.access_tags) for result in body}
    try:
        await _create_together(parent, body, tags)
    except IntegrityError:  # of some there is a node: all were refused
        return {"there": [result.key for result in body if not await _create(parent, result, tags[result.key])]}
    return {"there": []}


async def _create(parent: CatalogContainerAdapter, result: NewResult, tags: AccessTags) -> bool:
    """Make one node, as Tiled does; False if there is one of its key."""
    try:
        await parent.create_node(StructureFamily.container, result.metadata, result.key, _specs(result), [_source(result)], tags)
    except Collision:
        return False
    return True


async def _create_together(parent: CatalogContainerAdapter, results: Sequence[NewResult], tags: Mapping[str, AccessTags]) -> None:
    """Make nodes in one transaction, all or none, and tell subscribers: as `CatalogContainerAdapter.create_node`."""
    async with parent.context.session() as database:
        known: dict[AccessTags, list[Any]] = {}
        for names in filter(None, set(tags.values())):
            known[names] = await _resolve_access_tags(database, names)
        structures = {compute_structure_id(content): content for content in ({"keys": result.keys} for result in results)}
        for digest, content in structures.items():
            new = parent.insert(orm.Structure).values(id=digest, structure=content)
            await database.execute(new.on_conflict_do_nothing(index_elements=["id"]))
        nodes = [_node(parent, result, known.get(tags[result.key], [])) for result in results]
        database.add_all(nodes)
        await database.flush()
        sources = [int(node.data_sources[0].id) for node in nodes]
        await database.commit()
    for result, source in zip(results, sources, strict=True):
        await _tell(parent, result, source, tags[result.key])


def _node(parent: CatalogContainerAdapter, result: NewResult, tags: list[Any]) -> orm.Node:
    source = _source(result)
    return orm.Node(
        key=result.key,
        parent=parent.node.id,
        metadata_=result.metadata,
        structure_family=StructureFamily.container,
        specs=[spec.model_dump() for spec in _specs(result)],
        access_tags=tags,
        data_sources=[
            orm.DataSource(
                structure_family=source.structure_family,
                mimetype=source.mimetype,
                management=source.management,
                parameters=source.parameters,
                properties=source.properties,
                structure_id=compute_structure_id({"keys": result.keys}),
            )
        ],
    )


async def _tell(parent: CatalogContainerAdapter, result: NewResult, source: int, tags: AccessTags) -> None:
    """Tell subscribers of the container about a new node, in Tiled's words."""
    context, parent_id, now = parent.context, parent.node.id, datetime.now(tz=UTC)
    about = {
        "key": result.key,
        "structure_family": StructureFamily.container,
        "specs": [spec.model_dump() for spec in _specs(result)],
        "metadata": result.metadata,
    }
    if context.streaming_cache:
        sequence = await context.streaming_cache.incr_seq(parent_id)
        message = {
            "type": "container-child-created",
            "sequence": sequence,
            "timestamp": datetime.now().isoformat(),
            **about,
            "data_sources": [{**_source(result).model_dump(), "id": source}],
            "access_tags": sorted(tags),
        }
        await context.streaming_cache.set(parent_id, sequence, message)
    if context.webhook_dispatcher:
        path = [*await parent.path_segments(), result.key]
        await context.webhook_dispatcher.dispatch(
            ContainerChildCreatedEvent(timestamp=now, path=path, **about), node_id=parent_id
        )


def _specs(result: NewResult) -> list[Spec]:
    return specs_of(kind_of(str(result.metadata.get("method"))))


def _source(result: NewResult) -> DataSource[ContainerStructure]:
    return DataSource(
        structure_family=StructureFamily.container,
        structure=ContainerStructure(keys=result.keys),
        mimetype=RESULT_MIMETYPE,
        parameters=result.parameters,
        management=Management.external,
    )


async def _allowed_tags(policy: Any, who: tuple[Any, ...], tags: list[str] | None) -> Any:
    """Ask the access policy for the tags of a new node, as Tiled does."""
    if not hasattr(policy, "init_node"):
        return normalize_access_tags()
    wanted = None if tags is None else normalize_access_tags(tags)
    try:
        _, allowed = await policy.init_node(*who, access_tags=wanted)
    except ValueError as error:
        raise HTTPException(FORBIDDEN, f"Access policy rejects the provided access tags.\n{error}") from None
    return allowed
