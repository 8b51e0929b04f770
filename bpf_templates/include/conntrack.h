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

// Ones' complement sum of what is added to a checksum when `from` becomes `to`.
static __always_inline __u32 word_difference(__u64 sum, __be32 from, __be32 to) {
    sum += to;
    sum += (__u32)~from;
    sum = (__u32)sum + (sum >> 32);
    return (__u32)sum + (__u32)(sum >> 32);
}

// What translating from the key to the entry does to the checksums.
static __always_inline void set_differences(struct ct *entry, const struct ct_key *key) {
    __be32 from_ports = key->sport | (__u32)key->dport << 16;
    __be32 to_ports = entry->new_sport | (__u32)entry->new_dport << 16;
    entry->port_diff = 0;
    if (from_ports != to_ports)
        entry->port_diff = word_difference(0, from_ports, to_ports);
    else if (addr_equal(&key->src, &entry->new_src) && addr_equal(&key->dst, &entry->new_dst))
        return;
    __u32 sum = 0;
    for (int i = 0; i < ADDR_WORDS; i++) {
        sum = word_difference(sum, key->src.w[i], entry->new_src.w[i]);
        sum = word_difference(sum, key->dst.w[i], entry->new_dst.w[i]);
    }
    entry->addr_diff = sum;
    entry->flags |= CT_NAT;
}

// A UDP server of the node that listens on every address answers from the one its route prefers,
// not from the one that its entry is under. The key of that entry; 0: it is no such answer.
static __always_inline int answer_at_main_address(struct ct_key *key) {
    struct settings *node = node_settings();
    if (!node || key->proto != IPPROTO_UDP)
        return 0;
    node_address(node, &key->src);
    return 1;
}
