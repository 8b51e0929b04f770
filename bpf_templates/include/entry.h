// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// What every tc hook starts with: known flows are done here, by one lookup; the rest is handed on.

// The node that sent the packet through the tunnel; NULL where it is none of the cluster's.
static __always_inline int tunnel_source(struct __sk_buff *skb, struct node_key *from) {
    struct bpf_tunnel_key key = {};
    __be32 *w = (__be32 *)from->addr;
    if (bpf_skb_get_tunnel_key(skb, &key, sizeof(key), 0) == 0) {
        w[0] = 0;
        w[1] = 0;
        w[2] = MAPPED_WORD;
        w[3] = bpf_htonl(key.remote_ipv4);
    } else if (bpf_skb_get_tunnel_key(skb, &key, sizeof(key), BPF_F_TUNINFO_IPV6) == 0) {
        __builtin_memcpy(w, key.remote_ipv6, 16);
    } else {
        return -1;
    }
    return nodes.lookup(from) ? 0 : -1;
}

static __always_inline int jump(struct __sk_buff *skb, const struct packet *p, __u32 hook,
                                __u32 program) {
    struct flow *flow = policy_flow();
    if (flow) {
        fill_flow(flow, p, hook);
        jumps.call(skb, program);
    }
    count(COUNT_DROP_INTERNAL);
    return TC_ACT_SHOT;
}

// The pod behind the entry's veth is the one that the flow was judged for.
static __always_inline int pod_moved(const struct ct *entry) {
    struct endpoint *pod = endpoint_of(&entry->new_dst);
    return !pod || pod->ifindex != entry->ifindex;
}

// Once a second: is the next hop still the same, and the pod or a UDP flow's backend still there?
// 0: yes.
static __always_inline int refresh(struct __sk_buff *skb, const struct packet *p, struct ct *entry,
                                   __u64 now) {
    entry->checked = now;
    if (entry->action == ACT_PEER && pod_moved(entry))
        return -1;
    if (p->key.proto == IPPROTO_UDP && entry->backend && backend_gone(entry))
        return -1;
    find_route(skb, entry);
    return 0;
}

// A known flow's packet. 0: the flow is over, and the packet opens another one.
static __always_inline int established(struct __sk_buff *skb, const struct packet *p,
                                       struct ct *entry, __u32 hook, int *verdict) {
    __u64 now = bpf_ktime_get_coarse_ns();
    if (unlikely(p->tcp_flags & (TCPF_SYN | TCPF_FIN | TCPF_RST))) {
        if (opens_anew(entry, p->tcp_flags))
            return 0;
        note_tcp(entry, p->tcp_flags);
    }
    if (unlikely(now - entry->checked > SECOND) && refresh(skb, p, entry, now) < 0)
        return 0;
    entry->last_seen = now;
    entry->packets++;
    entry->bytes += skb->len;
    count(COUNT_ESTABLISHED);
    *verdict = forward(skb, p, entry, hook);
    return 1;
}

// A fragment whose ports nobody knows is nothing that a policy could allow.
static __always_inline int lost_fragment(struct __sk_buff *skb, const struct packet *p,
                                         __u32 hook) {
    addr_t pod = hook == HOOK_FROM_POD ? p->key.src : p->key.dst;
    struct endpoint *endpoint = endpoint_of(&pod);
    if (hook == HOOK_FROM_POD) {
        if (!endpoint || endpoint->ifindex != skb->ifindex) {
            count(COUNT_DROP_SPOOFED);
            return TC_ACT_SHOT;
        }
        if (!endpoint->egress_slot)
            return TC_ACT_UNSPEC;
    } else if (hook == HOOK_TO_NET ||
               (hook != HOOK_FROM_TUNNEL && (!endpoint || !endpoint->ingress_slot))) {
        return TC_ACT_UNSPEC;
    }
    count(COUNT_DROP_FRAGMENT);
    return TC_ACT_SHOT;
}

static __always_inline int unusual(struct __sk_buff *skb, const struct packet *p, __u32 hook,
                                   int parsed) {
    if (parsed == PARSED_PASS)
        return TC_ACT_UNSPEC;
    if (parsed == PARSED_ICMP_ERROR)
        return jump(skb, p, hook, JUMP_ICMP_ERROR);
    if (parsed == PARSED_LOST_FRAGMENT)
        return lost_fragment(skb, p, hook);
    if (hook == HOOK_TO_NET)
        return TC_ACT_UNSPEC;
    count(COUNT_DROP_MALFORMED);
    return TC_ACT_SHOT;
}

// Is the entry for packets that arrive here? (A pod's address on another interface is a forgery.)
// What comes from a pod or through the tunnel needs an entry bound to just that interface.
static __always_inline int entry_applies(struct __sk_buff *skb, const struct ct *entry,
                                         __u32 hook) {
    if (hook == HOOK_TO_NET)
        return entry->flags & CT_HOST_REPLY;
    if (hook == HOOK_TO_POD)
        return 1;
    if (hook == HOOK_FROM_POD || hook == HOOK_FROM_TUNNEL)
        return entry->in_ifindex == skb->ifindex;
    return !entry->in_ifindex || entry->in_ifindex == skb->ifindex;
}

// To an outside client from another of the node's addresses than the service's packet was sent to.
static __always_inline struct ct *answer_from_another_address(const struct packet *p) {
    struct ct_key key = p->key;
    if (!answer_at_main_address(&key) || addr_equal(&key.src, &p->key.src))
        return NULL;
    struct ct *asked = ct.lookup(&key);
    if (!asked || !(asked->flags & CT_HOST_REPLY) || !own_address(&p->key.src))
        return NULL;
    struct ct entry = *asked;
    entry.flags &= ~CT_NAT;
    set_differences(&entry, &p->key);
    ct.update((struct ct_key *)&p->key, &entry);
    return ct.lookup((struct ct_key *)&p->key);
}

static __always_inline int handle(struct __sk_buff *skb, __u32 hook) {
    struct packet p = {};
    struct node_key peer = {};
    if (skb->protocol != FAMILY_PROTOCOL)
        return TC_ACT_UNSPEC;
    if (hook == HOOK_FROM_TUNNEL && tunnel_source(skb, &peer) < 0) {
        count(COUNT_DROP_TUNNEL_SOURCE);
        return TC_ACT_SHOT;
    }
    int parsed = parse(skb, &p);
    if (unlikely(parsed != PARSED_FLOW))
        return unusual(skb, &p, hook, parsed);

    struct ct *entry = ct.lookup(&p.key);
    if (hook == HOOK_TO_NET && unlikely(!entry))
        entry = answer_from_another_address(&p);
    int verdict = TC_ACT_SHOT;
    if (likely(entry && entry_applies(skb, entry, hook)) &&
        established(skb, &p, entry, hook, &verdict))
        return verdict;
    if (hook == HOOK_TO_NET)
        return TC_ACT_UNSPEC;
    if (hook == HOOK_FROM_NET && p.key.proto == IPPROTO_TCP && !is_opening(p.tcp_flags)) {
        if (!endpoint_of(&p.key.src))
            return TC_ACT_UNSPEC;  // a flow older than we are: the stack knows, and to_pod judges
        count(COUNT_DROP_SPOOFED); // a pod of this node is not out there
        return TC_ACT_SHOT;
    }
    return jump(skb, &p, hook, JUMP_NEW_FLOW);
}
