// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// The end of the chain: both entries are written, and the first packet goes the way of all others.

#define PORT_TRIES 4
#define FIRST_EPHEMERAL 32768
#define EPHEMERALS 28232
#define EEXIST 17

static __always_inline void flow_packet(const struct flow *flow, struct packet *p) {
    __builtin_memcpy(&p->key, flow, sizeof(p->key));
    p->l4 = flow->l4;
    p->ttl = flow->ttl;
    p->tcp_flags = flow->tcp_flags;
    p->fragment = flow->fragment;
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

// Is the entry that has the key of another flow's replies one to be replaced: this very flow's, or
// a closed one's?
static __always_inline int is_replaceable(const struct ct_key *key, const struct flow *flow) {
    struct ct *other = ct.lookup((struct ct_key *)key);
    if (!other || flow_closed(other, flow->proto))
        return 1;
    return addr_equal(&other->new_src, &flow->dst) && addr_equal(&other->new_dst, &flow->src) &&
           other->new_sport == flow->dport && other->new_dport == flow->sport;
}

enum { STORED, KEY_TAKEN, TABLE_FULL };

// Most keys are free: they are written without being looked up.
static __always_inline int store_reply(const struct flow *flow, struct ct_key *key,
                                       struct ct *reply) {
    set_differences(reply, key);
    long failed = ct.insert(key, reply);
    if (likely(!failed))
        return STORED;
    if (failed != -EEXIST)
        return TABLE_FULL;
    if (flow->sport && flow->proto != FAMILY_ICMP && !is_replaceable(key, flow))
        return KEY_TAKEN;
    return ct.update(key, reply) < 0 ? TABLE_FULL : STORED;
}

// Replies of two flows may look alike (one client port, two services, one backend): then the
// second flow gets another source port, but with SCTP, whose checksum covers the ports.
static __always_inline int remember_reply(const struct flow *flow, struct ct *entry,
                                          struct ct *reply) {
    struct ct_key key;
    reply_key(entry, flow->proto, &key);
    int stored = store_reply(flow, &key, reply);
    if (likely(stored != KEY_TAKEN) || flow->hook == HOOK_TO_POD || flow->proto == IPPROTO_SCTP)
        return stored;
    for (int i = 1; i < PORT_TRIES; i++) {
        entry->new_sport = bpf_htons(FIRST_EPHEMERAL + bpf_get_prandom_u32() % EPHEMERALS);
        key.dport = entry->new_sport;
        stored = store_reply(flow, &key, reply);
        if (stored != KEY_TAKEN)
            break;
    }
    return stored;
}

static __always_inline int store_flow(struct __sk_buff *skb, const struct flow *flow,
                                      const struct packet *p, struct ct *entry) {
    __u64 now = bpf_ktime_get_coarse_ns();
    int stored;
    forward_entry(flow, now, entry);
    {
        struct ct reply = {};
        reply_entry(flow, now, &reply);
        stored = remember_reply(flow, entry, &reply);
    }
    set_differences(entry, &p->key);
    if (unlikely(stored == KEY_TAKEN)) // judged and passed, but not remembered
        return flow->hook == HOOK_TO_POD ? 0 : -1;
    if (unlikely(stored == TABLE_FULL))
        return -1;
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
