# SPDX-License-Identifier: Apache-2.0
"""Every map's byte layout, once, for Python and for C.

A `Struct` packs and unpacks in Python and prints itself as a C struct, so the two cannot drift;
`Struct.c_source` and `constants_source` are what the templates use. Sizes are checked in C by
`_Static_assert`.

Orders: addresses are bytes in network order; fields named `be16` are ports in network order
(given to Python as ints in host order, swapped here and nowhere else); all other integers are
host order. `addr` is 4 bytes in family 4 and 16 in family 6.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, field
from typing import Any

LAYOUT_VERSION = 2
"""Part of every map's pin name: raised when a layout changes, so that no old pin is misread."""

FAMILIES = (4, 6)


class MapType(enum.IntEnum):
    """`enum bpf_map_type` (uapi/linux/bpf.h), the ones in use."""

    HASH = 1
    ARRAY = 2
    PROG_ARRAY = 3
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    LPM_TRIE = 11


NO_PREALLOC = 1
"""`BPF_F_NO_PREALLOC`: entries are allocated when written; required for LPM tries."""

_SCALARS = {
    "u8": ("B", "__u8"),
    "u16": ("H", "__u16"),
    "be16": ("H", "__be16"),
    "u32": ("I", "__u32"),
    "u64": ("Q", "__u64"),
}


@dataclass(frozen=True, slots=True)
class Field:
    """One member: `kind` is a scalar, `addr`, or `bytesN` (an array of N bytes)."""

    name: str
    kind: str

    def size(self, family: int) -> int:
        """Size in bytes in the given address family."""
        if self.kind == "addr":
            return 4 if family == 4 else 16
        if self.kind.startswith("bytes"):
            return int(self.kind[5:])
        return struct.calcsize("=" + _SCALARS[self.kind][0])

    def code(self, family: int) -> str:
        """Code for the `struct` module."""
        if self.kind == "addr" or self.kind.startswith("bytes"):
            return f"{self.size(family)}s"
        return _SCALARS[self.kind][0]

    def zero(self, family: int) -> int | bytes:
        """The value of a field that is not given."""
        return bytes(self.size(family)) if self.code(family).endswith("s") else 0

    def declaration(self) -> str:
        """C declaration."""
        if self.kind == "addr":
            return f"addr_t {self.name};"
        if self.kind.startswith("bytes"):
            return f"__u8 {self.name}[{self.kind[5:]}];"
        return f"{_SCALARS[self.kind][1]} {self.name};"


@dataclass(frozen=True, slots=True)
class Struct:
    """A C struct without implicit padding (asserted in C)."""

    name: str
    fields: tuple[Field, ...]
    # worked out once per family: hundreds of thousands of entries are packed at start
    _codecs: dict[int, struct.Struct] = field(init=False, repr=False, compare=False)
    _zeros: dict[int, tuple[tuple[str, bool, Any], ...]] = field(
        init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        codecs, zeros = {}, {}
        for family in FAMILIES:
            codecs[family] = struct.Struct("=" + "".join(f.code(family) for f in self.fields))
            zeros[family] = tuple((f.name, f.kind == "be16", f.zero(family)) for f in self.fields)
        object.__setattr__(self, "_codecs", codecs)
        object.__setattr__(self, "_zeros", zeros)

    def size(self, family: int) -> int:
        """Size in bytes in the given address family."""
        return sum(f.size(family) for f in self.fields)

    def pack(self, family: int, **values: Any) -> bytes:
        """Bytes of the struct; fields not given are zero. Raises KeyError for unknown fields."""
        take = values.pop
        raw = [
            _swap16(take(name, zero)) if swap else take(name, zero)
            for name, swap, zero in self._zeros[family]
        ]
        if values:
            raise KeyError(f"struct {self.name} has no field {', '.join(sorted(values))}")
        return self._codecs[family].pack(*raw)

    def unpack(self, family: int, data: bytes) -> dict[str, Any]:
        """Values by field name; addresses as bytes, ports in host order."""
        raw = self._codecs[family].unpack(data)
        return {
            name: _swap16(value) if swap else value
            for (name, swap, _), value in zip(self._zeros[family], raw, strict=True)
        }

    def c_source(self, family: int) -> str:
        """The C definition with its size check."""
        body = "\n".join(f"    {f.declaration()}" for f in self.fields)
        check = f'_Static_assert(sizeof(struct {self.name}) == {self.size(family)}, "{self.name}");'
        return f"struct {self.name} {{\n{body}\n}};\n{check}\n"


def _swap16(value: int) -> int:
    return ((value & 0xFF) << 8) | (value >> 8)


def struct_of(name: str, **fields: str) -> Struct:
    """A Struct from keyword arguments, in their order."""
    return Struct(name, tuple(Field(n, k) for n, k in fields.items()))


@dataclass(frozen=True, slots=True)
class Map:
    """A pinned map. `per_family` maps exist once per address family, with the suffix 4 or 6."""

    name: str
    type: MapType
    key: Struct
    value: Struct
    max_entries: int
    flags: int = 0
    per_family: bool = True

    def pin_name(self, family: int) -> str:
        """Name of the pin, with the family and the layout version."""
        return f"{self.name}{family if self.per_family else ''}_v{LAYOUT_VERSION}"


U32 = struct_of("u32_value", value="u32")
INDEX = struct_of("index_key", index="u32")
ADDRESS_KEY = struct_of("address_key", addr="addr")

# -- services ---------------------------------------------------------------------------------

WILDCARD = b""
"""Address of a NodePort frontend: all zero; tried when the destination is a node's own."""


class FrontendFlag(enum.IntFlag):
    """Bits of `frontend.flags`."""

    INTERNAL_LOCAL = 1  # pods and nodes use the local list (internalTrafficPolicy: Local)
    EXTERNAL_LOCAL = 2  # outside clients use the local list (externalTrafficPolicy: Local)
    INTERNAL_DROP = 4  # an empty list is a DROP, not a REJECT, for pods and nodes
    EXTERNAL_DROP = 8  # the same for outside clients
    SOURCE_RANGES = 16  # loadBalancerSourceRanges: look the client up in source_ranges
    EXTERNAL = (
        32  # NodePort, load balancer and external addresses: may be answered through the tunnel
    )
    CLUSTER_IP = 64  # also alone, on the key with port 0 and proto 0: an allocated ClusterIP, whose
    # undefined ports are REJECTed


FRONTEND_MARKER = (0, 0)
"""Port and proto of the frontend key that marks an allocated ClusterIP; its value's flags are
CLUSTER_IP. Every ClusterIP needs one, beside its ports' frontends."""


class ListKind(enum.IntEnum):
    """Which list of a service port: `list = service * 2 + kind`."""

    CLUSTER = 0
    LOCAL = 1


class BackendFlag(enum.IntFlag):
    """Bits of `backend.flags`."""

    LOCAL = 1  # a pod (or this host's own process) on this node
    HOST = 2  # address is a node's own: a host-network pod


FRONTEND_KEY = struct_of("frontend_key", addr="addr", port="be16", proto="u8", pad="u8")
FRONTEND = struct_of(
    "frontend",
    service="u32",  # id of the service port; shared by all of its frontends
    cluster_count="u32",
    local_count="u32",
    affinity_seconds="u32",  # 0: no affinity
    flags="u32",
)
SLOT_KEY = struct_of("slot_key", list="u32", slot="u32")
BACKEND = struct_of(
    "backend",
    addr="addr",
    port="be16",
    flags="u16",
    node="bytes16",  # address of the backend's node, IPv4 as ::ffff:a.b.c.d; zero: unknown or local
)
LIST_KEY = struct_of("list_key", list="u32")
MAGLEV_SIZE = 256  # a power of two: the place is the hash's low byte
MAGLEV = struct_of("maglev_table", slots=f"bytes{MAGLEV_SIZE}")
"""Where the algorithm is Maglev: slots by hash, for lists of 2 to MAGLEV_SIZE backends."""
AFFINITY_KEY = struct_of("affinity_key", client="addr", service="u32")
AFFINITY = struct_of("affinity", last_seen="u64", backend="u32", pad="u32")
MEMBER_KEY = struct_of("member_key", list="u32", backend="u32")
SOURCE_RANGE_KEY = struct_of("source_range_key", prefixlen="u32", service="u32", addr="addr")
CIDR_KEY = struct_of("cidr_key", prefixlen="u32", addr="addr")

# -- addresses --------------------------------------------------------------------------------


class IdentityFlag(enum.IntFlag):
    """Bits of `identity.flags`."""

    POD = 1
    NODE = 2
    LOCAL = 4  # on this node


IDENTITY = struct_of("identity", id="u32", flags="u32")
"""Who an address is: every pod's and node's address in the cluster. id 0 means no identity."""

POLICY_SLOT_ALLOW = 0  # not isolated in this direction: no program is called
POLICY_SLOT_DENY = 1  # a program that denies everything
POLICY_SLOT_FIRST = 2

ENDPOINT = struct_of("endpoint", ifindex="u32", ingress_slot="u32", egress_slot="u32", flags="u32")
"""A pod of this node: its host-side veth and the policy programs of its two directions."""

NAMESPACE_KEY = struct_of("namespace_key", cookie="u64")
NAMESPACE = struct_of("namespace", addr="addr")
"""A pod of this node by its network namespace (SO_NETNS_COOKIE): the address it connects from."""

NODE_KEY = struct_of("node_key", addr="bytes16")
"""Always 16 bytes, IPv4 as ::ffff:a.b.c.d, for outer and inner addresses alike."""


class NodeFlag(enum.IntFlag):
    """Bits of a `nodes` value."""

    KNOWN = 1
    PORTS = 2  # the node serves NodePorts on this address


SETTINGS = struct_of(
    "settings",
    host_netns_cookie="u64",
    data_ifindex="u32",  # the data interface other nodes are reached through
    tunnel_ifindex="u32",  # 0: no tunnel device
    tunnel_vni="u32",
    flags="u32",
    node4="bytes4",
    tunnel_port="be16",
    overlay_port="be16",  # of the CNI's VXLAN; 0: there is none
    node6="bytes16",
)


class SettingsFlag(enum.IntFlag):
    """Bits of `settings.flags`."""

    DSR = 1
    POLICY_DISABLED = 2
    MAGLEV = 4
    CONNECT_TCP = 8  # pods' TCP sockets are translated when they connect
    CONNECT_UDP = 16  # and their UDP sockets, when they connect or send
    CONNECT_UDP_USED = 32  # some may be translated: CONNECT_UDP is or was set since the node booted


# -- flows: the packet path's own ---------------------------------------------------------------


class Hook(enum.IntEnum):
    """Where a flow's first packet was seen (`flow.hook`)."""

    FROM_POD = 0
    TO_POD = 1
    FROM_NET = 2
    TO_NET = 3
    FROM_TUNNEL = 4


class Action(enum.IntEnum):
    """What happens to a packet of a known flow after NAT (`ct.action`)."""

    STACK = 0  # to the node's stack
    PEER = 1  # into the pod behind the veth `ifindex`
    NEIGH = 2  # out of `ifindex` to `nexthop`
    TUNNEL = 3  # to the node `nexthop` (::ffff:a.b.c.d for IPv4) through the VXLAN device `ifindex`
    HOST_IN = 4  # into the stack as if received on `ifindex`: tunnelled, for a host-network backend


class CtFlag(enum.IntFlag):
    """Bits of `ct.flags`."""

    NAT = 1  # addresses or ports are rewritten
    REPLY = 2  # the entry of the reply direction
    HOST_REPLY = 4  # replies of a host-network backend: applied at to_net
    NEXTHOP6 = 8  # `nexthop` is an IPv6 address (in the IPv4 map: as ::ffff:a.b.c.d otherwise)
    HAIRPIN = 16


class TcpFlag(enum.IntFlag):
    """Bits of `ct.tcp`: what this direction has sent."""

    FIN = 1
    SYN = 2
    RST = 4
    ACK = 16  # only together with SYN: a SYN-ACK was seen


class Counter(enum.IntEnum):
    """Index into `counters`: packets, by what became of them."""

    ESTABLISHED = 0
    NEW_FLOW = 1
    STACK = 2
    REJECTED = 3
    DROP_SPOOFED = 4
    DROP_POLICY = 5
    DROP_POLICY_MISSING = 6
    DROP_MALFORMED = 7
    DROP_NO_BACKEND = 8
    DROP_SOURCE_RANGE = 9
    DROP_FRAGMENT = 10
    DROP_ICMP_ERROR = 11
    DROP_TUNNEL_SOURCE = 12
    DROP_TUNNEL_UNKNOWN = 13
    DROP_CONNTRACK_FULL = 14
    DROP_INTERNAL = 15
    ICMP_TRANSLATED = 16
    TTL_EXPIRED = 17
    TOO_BIG = 18
    DROP_NO_SERVICE = 19


class Jump(enum.IntEnum):
    """Slot of `jumps`: the programs of a new flow, tail-called."""

    NEW_FLOW = 0
    FINISH = 1
    REJECT = 2
    ICMP_ERROR = 3


class PolicyDirection(enum.IntEnum):
    """`flow.direction`: which policy the running policy program is."""

    INGRESS = 0
    EGRESS = 1


class SocketKind(enum.IntEnum):
    """`socket_key.kind`: what is looked up for a socket."""

    CHOICE = 0  # service address -> the backend this socket uses
    SERVICE = 1  # backend address -> the service address the process asked for


CT_KEY = struct_of(
    "ct_key", src="addr", dst="addr", sport="be16", dport="be16", proto="u8", pad="u8", pad2="u16"
)
"""A packet's 5-tuple as first seen on this node, one per direction. ICMP echo: sport is the id."""

CT = struct_of(
    "ct",
    last_seen="u64",  # CLOCK_MONOTONIC (coarse), ns
    packets="u64",
    bytes="u64",
    checked="u64",  # when next hop and backend were last looked up, ns
    ifindex="u32",
    in_ifindex="u32",  # packets of this direction must come from here; 0: any
    addr_diff="u32",  # checksum difference of the addresses
    port_diff="u32",  # of the ports
    backend="u32",  # id of the chosen backend, 0: none
    flags="u32",
    new_src="addr",
    new_dst="addr",
    new_sport="be16",
    new_dport="be16",
    action="u8",
    tcp="u8",
    mtu="u16",  # of the way to nexthop, without the tunnel's overhead; 0: not known
    nexthop="bytes16",
)

FLOW = struct_of(
    "flow",
    src="addr",  # src to pad2: a ct_key, as the packet was seen
    dst="addr",
    sport="be16",
    dport="be16",
    proto="u8",
    pad="u8",
    pad2="u16",
    new_src="addr",
    new_dst="addr",
    new_sport="be16",
    new_dport="be16",
    hook="u32",
    direction="u32",
    next_slot="u32",  # policy program after the running one; 0: none
    in_ifindex="u32",
    action="u32",
    ifindex="u32",
    reply_action="u32",
    reply_ifindex="u32",
    reply_in_ifindex="u32",
    reply_flags="u32",
    flags="u32",
    backend="u32",
    mtu="u32",  # for `reject`: the packet is refused as larger than this; 0: for lack of a backend
    l4="u32",  # offset of the transport header in the frame
    l4_proto="u8",
    ttl="u8",
    tcp_flags="u8",
    fragment="u8",
    node="bytes16",  # tunnel peer, of the forward or of the reply direction
)
"""A new flow on its way through the tail calls; per CPU."""

FRAGMENT_KEY = struct_of(
    "fragment_key", src="addr", dst="addr", id="u32", proto="u8", pad="u8", pad2="u16"
)
FRAGMENT = struct_of("fragment", sport="be16", dport="be16")

SOCKET_KEY = struct_of(
    "socket_key",
    cookie_low="u32",  # SO_COOKIE
    cookie_high="u32",
    addr="addr",
    port="be16",
    proto="u8",
    kind="u8",
)
SOCKET = struct_of("socket", addr="addr", port="be16", pad="u16", backend="u32")
COUNTER = struct_of("counter", packets="u64")

CONTROL_MAPS = (
    Map("frontends", MapType.HASH, FRONTEND_KEY, FRONTEND, 65536, NO_PREALLOC),
    Map("slots", MapType.HASH, SLOT_KEY, U32, 524288, NO_PREALLOC),
    Map("backends", MapType.HASH, INDEX, BACKEND, 262144, NO_PREALLOC),
    Map("maglev", MapType.HASH, LIST_KEY, MAGLEV, 131072, NO_PREALLOC),
    Map("affinity", MapType.LRU_HASH, AFFINITY_KEY, AFFINITY, 16384),
    Map("members", MapType.HASH, MEMBER_KEY, U32, 262144, NO_PREALLOC),
    Map("source_ranges", MapType.LPM_TRIE, SOURCE_RANGE_KEY, U32, 65536, NO_PREALLOC),
    Map("service_ranges", MapType.LPM_TRIE, CIDR_KEY, U32, 256, NO_PREALLOC),
    Map("dsr_optout", MapType.LPM_TRIE, CIDR_KEY, U32, 256, NO_PREALLOC),
    Map("endpoints", MapType.HASH, ADDRESS_KEY, ENDPOINT, 4096, NO_PREALLOC),
    Map("pod_namespaces", MapType.HASH, NAMESPACE_KEY, NAMESPACE, 4096, NO_PREALLOC),
    Map("identities", MapType.HASH, ADDRESS_KEY, IDENTITY, 524288, NO_PREALLOC),
    Map("own_addresses", MapType.HASH, ADDRESS_KEY, U32, 1024, NO_PREALLOC),
    Map("interfaces", MapType.HASH, INDEX, U32, 64, NO_PREALLOC, per_family=False),
    Map("nodes", MapType.HASH, NODE_KEY, U32, 16384, NO_PREALLOC, per_family=False),
    Map("settings", MapType.ARRAY, INDEX, SETTINGS, 1, per_family=False),
)
"""Maps the control plane fills. own_addresses: value bit 1 = NodePorts are served on it.

interfaces: by number, the devices with from_net and to_net, out of which packets may be sent.
"""

DATAPATH_MAPS = (
    Map("ct", MapType.LRU_HASH, CT_KEY, CT, 131072),
    Map("scratch", MapType.PERCPU_ARRAY, INDEX, FLOW, 1),
    Map("counters", MapType.PERCPU_ARRAY, INDEX, COUNTER, 32),
    Map("fragments", MapType.LRU_HASH, FRAGMENT_KEY, FRAGMENT, 4096),
    Map("sockets", MapType.LRU_HASH, SOCKET_KEY, SOCKET, 32768),
    Map("tcp_sockets", MapType.LRU_HASH, SOCKET_KEY, SOCKET, 32768),
    Map("policy", MapType.PROG_ARRAY, INDEX, U32, 4096),
    Map("jumps", MapType.PROG_ARRAY, INDEX, U32, 8),
)
"""Maps the programs fill themselves, and the prog arrays (policy: by slot, see POLICY_SLOT_*)."""

MAPS = CONTROL_MAPS + DATAPATH_MAPS

_ENUMS: tuple[tuple[str, type[enum.IntEnum] | type[enum.IntFlag]], ...] = (
    ("FRONTEND", FrontendFlag),
    ("LIST", ListKind),
    ("BACKEND", BackendFlag),
    ("IDENTITY", IdentityFlag),
    ("NODE", NodeFlag),
    ("SETTINGS", SettingsFlag),
    ("HOOK", Hook),
    ("ACT", Action),
    ("CT", CtFlag),
    ("TCPF", TcpFlag),
    ("COUNT", Counter),
    ("JUMP", Jump),
    ("POLICY", PolicyDirection),
    ("SOCKET", SocketKind),
)


def constants_source() -> str:
    """Every enum above, and the policy slots, as C defines."""
    constants = {f"{prefix}_{m.name}": int(m) for prefix, e in _ENUMS for m in e} | {
        "POLICY_SLOT_ALLOW": POLICY_SLOT_ALLOW,
        "POLICY_SLOT_DENY": POLICY_SLOT_DENY,
        "MAGLEV_SIZE": MAGLEV_SIZE,
    }
    return "".join(f"#define {name} {value}\n" for name, value in constants.items())
