// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// Entries of known flows: one per direction, each saying all there is to do with its packets.

// The key under which the replies to an entry's packets are found.
static __always_inline void reply_key(const struct ct *entry, __u8 proto, struct ct_key *key) {
    __builtin_memset(key, 0, sizeof(*key));
    key->src = entry->new_dst;
    key->dst = entry->new_src;
    key->proto = proto;
    if (proto == FAMILY_ICMP) {
        key->sport = entry->new_sport;
    } else {
        key->sport = entry->new_dport;
        key->dport = entry->new_sport;
    }
}

// The chosen backend left its service, or its id went to another one.
static __always_inline int backend_gone(const struct ct *entry) {
    __u32 id = entry->backend;
    struct backend *backend = backends.lookup(&id);
    if (!backend)
        return 1;
    if (entry->action == ACT_TUNNEL)
        return !same_node(backend->node, entry->nexthop);
    return !addr_equal(&backend->addr, &entry->new_dst) || backend->port != entry->new_dport;
}

static __always_inline int flow_closed(const struct ct *entry, __u8 proto) {
    struct ct_key key;
    if (entry->tcp & TCPF_RST)
        return 1;
    reply_key(entry, proto, &key);
    struct ct *other = ct.lookup(&key);
    if (!other || other->tcp & TCPF_RST)
        return 1;
    return (entry->tcp & TCPF_FIN) && (other->tcp & TCPF_FIN);
}

static __always_inline int is_opening(__u8 tcp_flags) {
    return (tcp_flags & (TCPF_SYN | TCPF_ACK)) == TCPF_SYN;
}

// A SYN on a closed flow opens a new one, and so does one whose backend is gone; a repeated SYN
// stays with its backend.
static __always_inline int opens_anew(const struct ct *entry, __u8 tcp_flags) {
    if (!is_opening(tcp_flags))
        return 0;
    return flow_closed(entry, IPPROTO_TCP) || (entry->backend && backend_gone(entry));
}

static __always_inline void note_tcp(struct ct *entry, __u8 tcp_flags) {
    __u8 seen = tcp_flags & (TCPF_FIN | TCPF_SYN | TCPF_RST);
    if ((tcp_flags & TCPF_SYN) && (tcp_flags & TCPF_ACK))
        seen |= TCPF_ACK;
    if ((entry->tcp | seen) != entry->tcp)
        entry->tcp |= seen;
}
