// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// ICMP errors belong to the flow whose packet they quote, and go its way: as the replies to that
// packet would, with the quoted header translated like them.

#define ICMP_HEADER 8
#define ICMP_CHECK 2

struct quoted {
    struct ct_key key; // of replies to the quoted packet
    __u32 l3;          // offset of the quoted network header
    __u32 l4;          // and of what follows it
};

// 0, or -1 where the error quotes too little, or something that is no flow's packet.
static __always_inline int read_quoted(struct __sk_buff *skb, const struct flow *flow,
                                       struct quoted *quoted) {
    __be16 ports[4];
    quoted->l3 = flow->l4 + ICMP_HEADER;
    __builtin_memset(&quoted->key, 0, sizeof(quoted->key));
#if FAMILY == 4
    struct iphdr ip;
    if (bpf_skb_load_bytes(skb, quoted->l3, &ip, sizeof(ip)) < 0 || ip.version != 4 || ip.ihl < 5)
        return -1;
    if (ip.frag_off & bpf_htons(0x1fff))
        return -1;
    quoted->key.src.w[0] = ip.daddr;
    quoted->key.dst.w[0] = ip.saddr;
    quoted->key.proto = ip.protocol;
    quoted->l4 = quoted->l3 + ip.ihl * 4;
#else
    struct ipv6hdr ip;
    if (bpf_skb_load_bytes(skb, quoted->l3, &ip, sizeof(ip)) < 0 || ip.version != 6)
        return -1;
    __builtin_memcpy(&quoted->key.src, &ip.daddr, 16);
    __builtin_memcpy(&quoted->key.dst, &ip.saddr, 16);
    quoted->key.proto = ip.nexthdr;
    quoted->l4 = quoted->l3 + sizeof(ip);
#endif
    if (bpf_skb_load_bytes(skb, quoted->l4, ports, sizeof(ports)) < 0)
        return -1;
    if (quoted->key.proto == FAMILY_ICMP) {
        if (!is_icmp_echo(*(__u8 *)ports))
            return -1;
        quoted->key.sport = ports[2];
    } else {
        quoted->key.sport = ports[1];
        quoted->key.dport = ports[0];
    }
    return 0;
}

// Replaces `size` bytes (a multiple of 4) and keeps the ICMP checksum right.
static __always_inline long replace_bytes(struct __sk_buff *skb, __u32 at, void *from, void *to,
                                          __u32 size, __u32 check) {
    __u32 diff = bpf_csum_diff(from, size, to, size, 0);
    if (bpf_skb_store_bytes(skb, at, to, size, 0) < 0)
        return -1;
    return check ? bpf_l4_csum_replace(skb, check, 0, diff, 0) : 0;
}

static __always_inline long translate_quoted_ports(struct __sk_buff *skb,
                                                   const struct quoted *quoted,
                                                   const struct ct *entry, __u32 check) {
    __be16 from[2] = {quoted->key.dport, quoted->key.sport};
    __be16 to[2] = {entry->new_dport, entry->new_sport};
    if (quoted->key.proto == FAMILY_ICMP)
        return 0;
    return replace_bytes(skb, quoted->l4, from, to, sizeof(to), check);
}

// The quoted header: its source is the translated reply's destination, and the reverse. In IPv4
// its own checksum takes up the difference, so that the ICMP checksum stays as it is.
static __always_inline long translate_quoted(struct __sk_buff *skb, const struct quoted *quoted,
                                             const struct ct *entry, __u32 check) {
    addr_t from[2] = {quoted->key.dst, quoted->key.src};
    addr_t to[2] = {entry->new_dst, entry->new_src};
#if FAMILY == 4
    __u32 diff = bpf_csum_diff((__be32 *)from, sizeof(from), (__be32 *)to, sizeof(to), 0);
    if (replace_bytes(skb, quoted->l3 + 12, from, to, sizeof(to), 0) < 0 ||
        bpf_l3_csum_replace(skb, quoted->l3 + 10, 0, diff, 0) < 0)
        return -1;
#else
    if (replace_bytes(skb, quoted->l3 + 8, from, to, sizeof(to), check) < 0)
        return -1;
#endif
    return translate_quoted_ports(skb, quoted, entry, check);
}

// The error itself goes to who sent the quoted packet. It came from a router, or from the backend:
// then it is the service that seems to answer.
static __always_inline long translate_error(struct __sk_buff *skb, const struct flow *flow,
                                            const struct quoted *quoted, struct ct *entry) {
    __u32 check = flow->l4 + ICMP_CHECK;
    addr_t from[2] = {flow->src, flow->dst};
    addr_t to[2] = {flow->src, entry->new_dst};
    if (addr_equal(&flow->src, &quoted->key.src))
        to[0] = entry->new_src;
    if (translate_quoted(skb, quoted, entry, check) < 0)
        return -1;
    entry->new_src = to[0];
    entry->new_dst = to[1];
    entry->addr_diff = bpf_csum_diff((__be32 *)from, sizeof(from), (__be32 *)to, sizeof(to), 0);
    return FAMILY == 4 ? 0 : replace_pseudo(skb, check, entry->addr_diff, 0);
}

// An error that belongs to no flow: the node's own may pass, a pod without policy may have it.
static __always_inline int unknown_error(struct __sk_buff *skb, const struct flow *flow) {
    addr_t pod = flow->hook == HOOK_FROM_POD ? flow->src : flow->dst;
    struct endpoint *endpoint = endpoint_of(&pod);
    int isolated = 0;
    if (flow->hook == HOOK_FROM_TUNNEL)
        return drop(COUNT_DROP_ICMP_ERROR);
    if (flow->hook == HOOK_FROM_POD)
        isolated = endpoint && endpoint->egress_slot;
    else if (flow->hook == HOOK_TO_POD)
        isolated = endpoint && endpoint->ingress_slot && skb->ingress_ifindex;
    return isolated ? drop(COUNT_DROP_ICMP_ERROR) : to_stack();
}

static __always_inline int error_may_enter(struct __sk_buff *skb, const struct flow *flow) {
    if (flow->hook != HOOK_FROM_POD)
        return 1;
    struct endpoint *source = endpoint_of(&flow->src);
    return source && source->ifindex == skb->ifindex;
}

static __always_inline int carry_error(struct __sk_buff *skb) {
    struct flow *flow = policy_flow();
    struct quoted quoted;
    struct packet p = {};
    if (!flow)
        return TC_ACT_SHOT;
    if (!error_may_enter(skb, flow))
        return drop(COUNT_DROP_SPOOFED);
    if (read_quoted(skb, flow, &quoted) < 0 || !addr_equal(&quoted.key.dst, &flow->dst))
        return flow->hook == HOOK_TO_NET ? TC_ACT_UNSPEC : unknown_error(skb, flow);
    struct ct *known = ct.lookup(&quoted.key);
    if (!known || !entry_applies(skb, known, flow->hook))
        return flow->hook == HOOK_TO_NET ? TC_ACT_UNSPEC : unknown_error(skb, flow);

    if (known->action == ACT_NEIGH && !known->ifindex) // the first reply is the error
        find_route(skb, known);
    struct ct entry = *known;
    flow_packet(flow, &p);
    p.key.proto = FAMILY_ICMP;
    count(COUNT_ICMP_TRANSLATED);
    if ((entry.flags & CT_NAT) && translate_error(skb, flow, &quoted, &entry) < 0)
        return drop(COUNT_DROP_MALFORMED);
    return forward(skb, &p, &entry, flow->hook);
}
