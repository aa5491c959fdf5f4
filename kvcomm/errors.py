"""Everything kvcomm raises on purpose.

KVCommError
|-- InputError          the caller's input cannot be used (also a ValueError): empty prompt, prompt over the context, bad option
|   `-- TeamError       a team description that cannot be run: unknown agent, cycle where none may be
|-- TurnFailed          an agent of a team could not answer; in kvcomm.agents.team, with the turns that were finished
|-- ChildFailed         a process of the demo could not begin, or has died; in kvcomm.demo.on_processes
|-- UnsupportedModel    the model's cache cannot be moved or read correctly; refused when it is loaded
|-- Malformed           bytes that are no frame or no request; in kvcomm.wire.protocol: said, and then hung up on
|-- Refused             a request that is understood and not served; in kvcomm.wire.session: said to the client
`-- CacheFault          stored KV cannot be used (wrong fingerprint, NaN, truncated); never leaves the engine: the request is
    |                   answered densely and the fault is counted
    |-- Unreadable      a record is damaged, of another version, or of another key; in kvcomm.store.record
    |-- RemoteFault     a service on another machine cannot be used now; in kvcomm.store.remote
    `-- Unreachable     the server cannot be asked now; in kvcomm.wire.transport
"""

__all__ = ["CacheFault", "InputError", "KVCommError", "TeamError", "UnsupportedModel"]


class KVCommError(Exception):
    """Base of every error of kvcomm."""


class InputError(KVCommError, ValueError):
    """The caller's input cannot be used; the text names the value and the remedy."""


class TeamError(InputError):
    """A team description cannot be run."""


class UnsupportedModel(KVCommError):
    """This model's KV-cache cannot be shared; the text says why."""


class CacheFault(KVCommError):
    """Stored KV cannot be used. Internal: the engine turns it into a dense answer and counts it."""
