// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// The end of the chain: both entries are written, and the first packet goes the way of all others.

#define PORT_TRIES 4
#define FIRST_EPHEMERAL 32768
#define EPHEMERALS 28232

static __always_inline void flow_packet(const struct flow *flow, struct packet *p) {
    __builtin_memcpy(&p->key, flow, sizeof(p->key));
    p->l4 = flow->l4;
    p->ttl = flow->ttl;
    p->tcp_flags = flow->tcp_flags;
    p->fragment = flow->fragment;
}

static __always_inline void set_differences(struct ct *entry, const struct ct_key *key) {
    addr_t from[2] = {key->src, key->dst};
    addr_t to[2] = {entry->new_src, entry->new_dst};
    __be32 from_ports = key->sport | (__u32)key->dport << 16;
    __be32 to_ports = entry->new_sport | (__u32)entry->new_dport << 16;
    if (from_ports != to_ports)
        entry->port_diff = bpf_csum_diff(&from_ports, 4, &to_ports, 4, 0);
    if (from_ports == to_ports && addr_equal(&from[0], &to[0]) && addr_equal(&from[1], &to[1]))
        return;
    entry->addr_diff = bpf_csum_diff((__be32 *)from, sizeof(from), (__be32 *)to, sizeof(to), 0);
    entry->flags |= CT_NAT;
}

static __always_inline void forward_entry(const struct flow *flow, __u64 now, struct ct *entry) {
    entry->last_seen = now;
    entry->checked = now;
    entry->in_ifindex = flow->in_ifindex;
    entry->ifindex = flow->ifindex;
    entry->action = flow->action;
    entry->backend = flow->backend;
    entry->new_src = flow->new_src;
    entry->new_dst = flow->new_dst;
    entry->new_sport = flow->new_sport;
    entry->new_dport = flow->new_dport;
    if (flow->flags & FLOW_HAIRPIN)
        entry->flags |= CT_HAIRPIN;
    if (flow->action == ACT_TUNNEL)
        copy_node(entry->nexthop, flow->node);
}

static __always_inline void reply_entry(const struct flow *flow, __u64 now, struct ct *entry) {
    entry->last_seen = now;
    entry->in_ifindex = flow->reply_in_ifindex;
    entry->ifindex = flow->reply_ifindex;
    entry->action = flow->reply_action;
    entry->flags = CT_REPLY | flow->reply_flags;
    entry->new_src = flow->dst;
    entry->new_dst = flow->src;
    if (flow->proto == FAMILY_ICMP) {
        entry->new_sport = flow->sport;
    } else {
        entry->new_sport = flow->dport;
        entry->new_dport = flow->sport;
    }
    if (flow->reply_action == ACT_TUNNEL)
        copy_node(entry->nexthop, flow->node);
}

// Replies of two flows may look alike (one client port, two services, one backend): then the
// second flow gets another source port. 1: the key is free, or was this very flow's.
static __always_inline int key_is_free(const struct ct_key *key, const struct flow *flow) {
    struct ct *other = ct.lookup((struct ct_key *)key);
    if (!other || flow_closed(other, flow->proto))
        return 1;
    return addr_equal(&other->new_src, &flow->dst) && addr_equal(&other->new_dst, &flow->src) &&
           other->new_sport == flow->dport && other->new_dport == flow->sport;
}

static __always_inline int reserve_reply_key(const struct flow *flow, struct ct *entry,
                                             struct ct_key *key) {
    reply_key(entry, flow->proto, key);
    if (flow->proto != IPPROTO_TCP && flow->proto != IPPROTO_UDP)
        return 1;
    if (flow->hook == HOOK_TO_POD)
        return key_is_free(key, flow);
    for (int i = 0; i < PORT_TRIES; i++) {
        if (key_is_free(key, flow))
            return 1;
        entry->new_sport = bpf_htons(FIRST_EPHEMERAL + bpf_get_prandom_u32() % EPHEMERALS);
        key->dport = entry->new_sport;
    }
    return 0;
}

static __always_inline int store_flow(struct __sk_buff *skb, const struct flow *flow,
                                      const struct packet *p, struct ct *entry) {
    __u64 now = bpf_ktime_get_coarse_ns();
    struct ct_key key;
    forward_entry(flow, now, entry);
    if (!reserve_reply_key(flow, entry, &key)) { // judged and passed, but not remembered
        set_differences(entry, &p->key);
        return flow->hook == HOOK_TO_POD ? 0 : -1;
    }
    {
        struct ct reply = {};
        reply_entry(flow, now, &reply);
        set_differences(&reply, &key);
        if (ct.update(&key, &reply) < 0)
            return -1;
    }
    set_differences(entry, &p->key);
    note_tcp(entry, p->tcp_flags);
    entry->packets = 1;
    entry->bytes = skb->len;
    find_route(skb, entry);
    return ct.update((struct ct_key *)&p->key, entry) < 0 ? -1 : 0;
}

static __always_inline int finish_flow(struct __sk_buff *skb) {
    struct flow *flow = policy_flow();
    struct packet p = {};
    struct ct entry = {};
    if (!flow)
        return TC_ACT_SHOT;
    flow_packet(flow, &p);
    count(COUNT_NEW_FLOW);
    if (store_flow(skb, flow, &p, &entry) < 0) {
        count(COUNT_DROP_CONNTRACK_FULL);
        return TC_ACT_SHOT;
    }
    return forward(skb, &p, &entry, flow->hook);
}
