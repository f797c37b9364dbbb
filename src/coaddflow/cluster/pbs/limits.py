"""What one job can get at most: from the largest node that its queue uses, and the queue's limits.

OpenPBS says ``Can Never Run`` only of a request above the total of all nodes. One that fits the
total and no single node waits for ever, so it is refused here, before and after its submission.
"""

import contextlib
import json
import re
import time
from collections import namedtuple

from coaddflow.cluster.pbs import records, server

MAX_AGE = 600.0
"""Seconds for which the answers about nodes and queues are used."""

MAX_AGE_FOR_WAITING = 120.0
"""The same for a job that waits: a node may have been taken out of service meanwhile."""

NO_LIMIT = 10**12

Largest = namedtuple("Largest", "nodes runtime where")
"""The largest job of a queue: memory (MB of PBS, 1024 x 1024 bytes) and cores of its nodes, each
kind once; longest time in minutes, None: no limit; the queue, for messages."""

Asked = namedtuple("Asked", "mem_mb cores runtime queue")
"""What a job asks for; 0 or empty: nothing."""

_UNITS = {"b": 1, "kb": 2**10, "mb": 2**20, "gb": 2**30, "tb": 2**40, "pb": 2**50}
_NOT_USED = re.compile(r"stale|unresolvable|state-unknown")
"""States of a node that is gone; one that is down, offline for maintenance, or busy will be back,
and what waits for it is not to be deleted."""


def exceeded(asked, folder=None, max_age=MAX_AGE):
    """Return in words what a job asks for that no node or queue can give; empty: nothing.

    A node that was added a moment ago counts.

    Parameters
    ----------
    asked : Asked
        What the job asks for.
    folder : Path, optional
        Where the server's answers are kept; by default `records.FOLDER`.
    max_age : float
        Seconds for which earlier answers are used, if they allow the request.
    """
    found = _exceeded(asked, largest(asked.queue, max_age, folder))
    if found:
        found = _exceeded(asked, largest(asked.queue, server.setting("POLL", 10), folder))
    return found


def _exceeded(asked, most):
    cores = max(asked.cores, 1)
    if most.nodes:
        enough = [memory for memory, found in most.nodes if found >= cores]
        if not enough:
            found = max(found for _, found in most.nodes)
            return f"asks for {cores} cores, and the largest node of {most.where} has {found}"
        if asked.mem_mb > max(enough):
            with_cores = f" with {cores} cores" if len(enough) < len(most.nodes) else ""
            return (
                f"asks for {asked.mem_mb} MB, and the largest node of {most.where}{with_cores} has "
                f"{max(enough)} MB"
            )
    if most.runtime is not None and asked.runtime > most.runtime:
        return f"asks for {asked.runtime} minutes, and {most.where} allows {most.runtime}"
    return ""


def largest(queue="", max_age=MAX_AGE, folder=None):
    """Return the largest job of a queue, of the server's default queue if none is named."""
    facts = _facts(max_age, folder or records.FOLDER)
    name = queue.partition("@")[0] or facts["server"].get("default_queue") or ""
    found = facts["queues"].get(name, {})
    # a routing queue passes jobs on to the first of these that takes them
    ends = [end.partition("@")[0] for end in found.get("destinations", [])] or [name]
    nodes, times = set(), []
    for end in ends:
        limits = dict(facts["server"].get("max", {}))
        limits.update(facts["queues"].get(end, {}).get("max", {}))
        limits.update(found.get("max", {}))
        memory, cores = limits.get("mem") or NO_LIMIT, limits.get("ncpus") or NO_LIMIT
        for has in _nodes_of(end, facts):
            nodes.add((min(has[0], memory), min(has[1], cores)))
        times.append(limits.get("walltime"))
    runtime = None if None in times else max(times)
    return Largest(tuple(sorted(nodes)), runtime, f"queue {name}" if name else "the server")


def _nodes_of(queue, facts):
    """Return memory and cores of the nodes on which jobs of a queue may run."""
    nodes = facts["nodes"]
    own = [node for node in nodes if node["queue"] == queue]
    nodes = own or [node for node in nodes if not node["queue"]]
    nodes = [node for node in nodes if node["used"]] or nodes
    return [(node["mem"], node["cores"]) for node in nodes]


def _facts(max_age, folder):
    """Return what the server says about nodes and queues, at most so many seconds old.

    What it does not say is no limit; an older answer is better than none.
    """
    nothing = {"asked": 0.0, "nodes": [], "queues": {}, "server": {}}
    try:
        last = dict(nothing, **json.loads(records.read(folder / "limits.json")))
    except (ValueError, TypeError):
        last = nothing
    if 0 <= time.time() - last["asked"] < max_age:
        return last
    nodes = parse_nodes(_answer("pbsnodes", "-av", "-F", "json"))
    if not nodes and last["nodes"]:
        return last
    queues = parse_queues(_answer("qstat", "-Qf", "-F", "json")) if nodes else {}
    main = parse_server(_answer("qstat", "-Bf", "-F", "json")) if nodes else {}
    facts = {"asked": time.time(), "nodes": nodes, "queues": queues, "server": main}
    with contextlib.suppress(OSError):  # a full disk: then the next process asks again
        records.write(folder / "limits.json", json.dumps(facts))
    return facts


def _answer(*command):
    """Return what a command of PBS prints as JSON; empty if it says nothing of use."""
    try:
        code, out, _ = server.run(*command)
        found = json.loads(out, strict=False) if code == 0 else {}
    except (server.ServerAwayError, OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def parse_nodes(answer):
    """Return the nodes in an answer of pbsnodes.

    A chunk of a job may have several vnodes, if they are of one host.
    """
    hosts = {}
    for name, vnode in answer.get("nodes", {}).items():
        has = vnode.get("resources_available", {})
        key = (str(has.get("host", name)), str(vnode.get("queue", "")))
        host = {"mem": 0, "cores": 0, "queue": key[1], "used": False}
        host = hosts.setdefault(key, host)
        memory = megabytes(has.get("mem"))
        host["mem"] += NO_LIMIT if memory is None else memory
        host["cores"] += int(has.get("ncpus", 1))
        used = not _NOT_USED.search(str(vnode.get("state", "")))
        host["used"] = host["used"] or used
    return list(hosts.values())


def parse_queues(answer):
    """Return type, limits and destinations of the queues in an answer of ``qstat -Qf``."""
    return {
        name: {
            "max": _maxima(queue),
            "destinations": [
                end.strip()
                for end in str(queue.get("route_destinations", "")).split(",")
                if end.strip()
            ],
        }
        for name, queue in answer.get("Queue", {}).items()
    }


def parse_server(answer):
    """Return default queue and limits of the server in an answer of ``qstat -Bf``."""
    for found in answer.get("Server", {}).values():
        return {"default_queue": found.get("default_queue", ""), "max": _maxima(found)}
    return {}


def _maxima(attributes):
    """Return the limits of a queue or server for one job, those that it has."""
    limits = attributes.get("resources_max", {})
    cores = str(limits.get("ncpus", ""))
    found = {
        "mem": megabytes(limits.get("mem")),
        "ncpus": int(cores) if cores.isdigit() else None,
        "walltime": minutes(limits.get("walltime")),
    }
    return {name: value for name, value in found.items() if value is not None}


def megabytes(size):
    """Return a size of PBS, such as ``6gb``, in MB of PBS; None if it is none."""
    match = re.match(r"(\d+)([kmgtp]?b)?$", str(size).strip().lower())
    if not match:
        return None
    return int(match.group(1)) * _UNITS[match.group(2) or "b"] // 2**20


def minutes(duration):
    """Return a duration of PBS, ``[HH:[MM:]]SS``, in whole minutes; None if it is none."""
    text = str(duration).strip()
    if not re.match(r"\d+(:\d+){0,2}$", text):
        return None
    seconds = 0
    for part in text.split(":"):
        seconds = 60 * seconds + int(part)
    return seconds // 60
