// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// What an entry says is done to the packet: route, rewrite, deliver.

#define FIB_SKIP_NEIGHBOUR 4    // BPF_FIB_LOOKUP_SKIP_NEIGH, Linux 6.3
#define CSUM_IPV6 (1ULL << 7)   // BPF_F_IPV6, Linux 6.16
#define HOST_IN_MARK 0x62706470 // from_tunnel to from_net: deliver this one to the node itself
#define AF_IPV4 2
#define AF_IPV6 10
#define TUNNEL_OVERHEAD_4 50 // outer IPv4 20, UDP 8, VXLAN 8, inner Ethernet 14
#define TUNNEL_OVERHEAD_6 70
#define TTL_STEP 0xfffe       // ones' complement of 1: ttl is the low byte of its word
#define HOP_LIMIT_STEP 0xfeff // hop limit is the high byte of its word

// BCC 0.26 declares this helper without its size argument.
static long (*redirect_neighbour)(__u32 ifindex, struct bpf_redir_neigh *params, int size,
                                  __u64 flags) = (void *)BPF_FUNC_redirect_neigh;

// 0: a route was found; the neighbour need not be known yet.
static __always_inline int fib_lookup(struct __sk_buff *skb, struct bpf_fib_lookup *fib) {
    fib->tot_len = 1; // asks for the route's MTU
    long found = bpf_fib_lookup(skb, fib, sizeof(*fib), FIB_SKIP_NEIGHBOUR);
    if (found < 0) { // a kernel without the flag
        fib->tot_len = 0;
        found = bpf_fib_lookup(skb, fib, sizeof(*fib), 0);
    }
    return found == BPF_FIB_LKUP_RET_SUCCESS || found == BPF_FIB_LKUP_RET_NO_NEIGH ? 0 : -1;
}

static __always_inline int is_data_interface(__u32 ifindex) {
    return interfaces.lookup((struct index_key *)&ifindex) != NULL;
}

// Next hop of the entry's packets, by the node's own routes and rules. ifindex 0, the stack, where
// the route does not lead out of a data interface.
static __always_inline void find_neighbour(struct __sk_buff *skb, struct ct *entry) {
    struct bpf_fib_lookup fib = {.family = FAMILY_AF, .ifindex = skb->ifindex};
    entry->ifindex = 0;
#if FAMILY == 4
    fib.ipv4_src = entry->new_src.w[0];
    fib.ipv4_dst = entry->new_dst.w[0];
#else
    __builtin_memcpy(fib.ipv6_src, &entry->new_src, 16);
    __builtin_memcpy(fib.ipv6_dst, &entry->new_dst, 16);
#endif
    if (fib_lookup(skb, &fib) < 0 || !is_data_interface(fib.ifindex))
        return;
    __be32 *hop = (__be32 *)entry->nexthop;
    if (FAMILY == 6 || fib.family == AF_IPV6) {
        __builtin_memcpy(hop, fib.ipv6_dst, 16);
        entry->flags |= CT_NEXTHOP6;
    } else {
        hop[0] = 0;
        hop[1] = 0;
        hop[2] = MAPPED_WORD;
        hop[3] = fib.ipv4_dst;
        entry->flags &= ~CT_NEXTHOP6;
    }
    entry->mtu = fib.mtu_result;
    entry->ifindex = fib.ifindex;
}

static __always_inline int is_mapped(const __be32 *node) {
    return !node[0] && !node[1] && node[2] == MAPPED_WORD;
}

// How large a packet may be that goes through the tunnel. An IPv6 tunnel's own packets are never
// fragmented on the way.
static __always_inline void find_tunnel_mtu(struct __sk_buff *skb, struct ct *entry) {
    const __be32 *peer = (const __be32 *)entry->nexthop;
    struct bpf_fib_lookup fib = {.ifindex = skb->ifindex};
    __u32 overhead = TUNNEL_OVERHEAD_4;
    if (is_mapped(peer)) {
        fib.family = AF_IPV4;
        fib.ipv4_dst = peer[3];
    } else {
        fib.family = AF_IPV6;
        overhead = TUNNEL_OVERHEAD_6;
        __builtin_memcpy(fib.ipv6_dst, peer, 16);
    }
    entry->mtu = 0;
    if (fib_lookup(skb, &fib) == 0 && fib.mtu_result > overhead)
        entry->mtu = fib.mtu_result - overhead;
}

static __always_inline void find_route(struct __sk_buff *skb, struct ct *entry) {
    if (entry->action == ACT_NEIGH)
        find_neighbour(skb, entry);
    else if (entry->action == ACT_TUNNEL)
        find_tunnel_mtu(skb, entry);
}

// Size of the packet, or of the largest one that it will be cut into.
static __always_inline __u32 segment_size(struct __sk_buff *skb, const struct packet *p) {
    __u8 offset = 0;
    if (!skb->gso_size)
        return skb->len - ETH_HLEN;
    if (p->key.proto != IPPROTO_TCP)
        return p->l4 - ETH_HLEN + 8 + skb->gso_size;
    bpf_skb_load_bytes(skb, p->l4 + 12, &offset, 1);
    return p->l4 - ETH_HLEN + (offset >> 4) * 4 + skb->gso_size;
}

static __always_inline int too_big(struct __sk_buff *skb, const struct packet *p,
                                   const struct ct *entry) {
    if (!entry->mtu || skb->len <= (__u32)entry->mtu + ETH_HLEN)
        return 0;
    return segment_size(skb, p) > entry->mtu;
}

static __always_inline __u32 fold(__u32 sum) {
    sum = (sum & 0xffff) + (sum >> 16);
    return (sum & 0xffff) + (sum >> 16);
}

static __always_inline long replace_pseudo(struct __sk_buff *skb, __u32 at, __u32 diff,
                                           __u64 flags) {
#if FAMILY == 4
    return bpf_l4_csum_replace(skb, at, 0, diff, flags | BPF_F_PSEUDO_HDR);
#else
    long done = bpf_l4_csum_replace(skb, at, 0, diff, flags | BPF_F_PSEUDO_HDR | CSUM_IPV6);
    if (unlikely(done < 0)) // a kernel without the flag
        done = bpf_l4_csum_replace(skb, at, 0, diff, flags | BPF_F_PSEUDO_HDR);
    return done;
#endif
}

// The transport checksum: addresses through the pseudo header, ports apart, so that it is right
// for packets whose checksum is yet to be computed too. A UDP checksum of 0 means none.
static __always_inline long replace_checksum(struct __sk_buff *skb, __u32 l4, __u8 proto,
                                             const struct ct *entry) {
    __u32 at;
    __u64 flags = 0;
    if (proto == IPPROTO_TCP) {
        at = l4 + 16;
    } else if (proto == IPPROTO_UDP) {
        at = l4 + 6;
        flags = BPF_F_MARK_MANGLED_0;
    } else {
        return 0;
    }
    __u32 ports = entry->port_diff;
    if (replace_pseudo(skb, at, entry->addr_diff, flags) < 0)
        return -1;
    return ports ? bpf_l4_csum_replace(skb, at, 0, ports, flags) : 0;
}

// The network header: addresses of the entry, and one hop less when the stack is passed by.
static __always_inline int rewrite_network(struct __sk_buff *skb, const struct ct *entry, int hop) {
#if FAMILY == 4
    struct iphdr *ip = frame(skb) + ETH_HLEN;
    if ((void *)(ip + 1) > frame_end(skb))
        return -1;
    __u32 sum = (__u16)~ip->check;
    if (entry->flags & CT_NAT) {
        ip->saddr = entry->new_src.w[0];
        ip->daddr = entry->new_dst.w[0];
        sum += fold(entry->addr_diff);
    }
    if (hop) {
        ip->ttl--;
        sum += TTL_STEP;
    }
    ip->check = ~fold(sum);
#else
    struct ipv6hdr *ip = frame(skb) + ETH_HLEN;
    if ((void *)(ip + 1) > frame_end(skb))
        return -1;
    if (entry->flags & CT_NAT) {
        __builtin_memcpy(&ip->saddr, &entry->new_src, 16);
        __builtin_memcpy(&ip->daddr, &entry->new_dst, 16);
    }
    if (hop) {
        ip->hop_limit--;
        bpf_csum_update(skb, HOP_LIMIT_STEP);
    }
#endif
    return 0;
}

static __always_inline int rewrite_transport(struct __sk_buff *skb, const struct packet *p,
                                             const struct ct *entry) {
    __u32 l4 = p->l4;
    __u8 proto = p->key.proto;
    if (p->fragment == FRAGMENT_LATER || proto == FAMILY_ICMP)
        return 0;
    if (proto != IPPROTO_TCP && proto != IPPROTO_UDP && proto != IPPROTO_SCTP)
        return 0;
    if (l4 > MAX_L4_OFFSET)
        return -1;
    __be16 *ports = frame(skb) + l4;
    if ((void *)(ports + 4) > frame_end(skb))
        return -1;
    ports[0] = entry->new_sport;
    ports[1] = entry->new_dport;
    return replace_checksum(skb, l4, proto, entry);
}

static __always_inline int deliver_neighbour(const struct ct *entry) {
    const __be32 *hop = (const __be32 *)entry->nexthop;
    struct bpf_redir_neigh neighbour = {};
    if (FAMILY == 6 || entry->flags & CT_NEXTHOP6) {
        neighbour.nh_family = AF_IPV6;
        __builtin_memcpy(neighbour.ipv6_nh, hop, 16);
    } else {
        neighbour.nh_family = AF_IPV4;
        neighbour.ipv4_nh = hop[3];
    }
    return redirect_neighbour(entry->ifindex, &neighbour, sizeof(neighbour), 0);
}

static __always_inline int deliver_tunnel(struct __sk_buff *skb, const struct ct *entry) {
    const __be32 *peer = (const __be32 *)entry->nexthop;
    struct settings *node = node_settings();
    struct bpf_tunnel_key key = {.tunnel_ttl = 64};
    __u64 flags = BPF_F_ZERO_CSUM_TX;
    if (!node)
        return TC_ACT_SHOT;
    key.tunnel_id = node->tunnel_vni;
    if (is_mapped(peer)) {
        key.remote_ipv4 = bpf_ntohl(peer[3]);
    } else {
        __builtin_memcpy(key.remote_ipv6, peer, 16);
        flags = BPF_F_TUNINFO_IPV6;
    }
    if (bpf_skb_set_tunnel_key(skb, &key, sizeof(key), flags) < 0) {
        count(COUNT_DROP_INTERNAL);
        return TC_ACT_SHOT;
    }
    return bpf_redirect(entry->ifindex, 0);
}

static __always_inline int deliver(struct __sk_buff *skb, const struct ct *entry, __u8 action) {
    switch (action) {
    case ACT_PEER:
        if (skb->pkt_type !=
            PACKET_HOST) // addressed to another pod of a bridge, or to the first node
            bpf_skb_change_type(skb, PACKET_HOST);
        return bpf_redirect_peer(entry->ifindex, 0);
    case ACT_NEIGH:
        return deliver_neighbour(entry);
    case ACT_TUNNEL:
        return deliver_tunnel(skb, entry);
    case ACT_HOST_IN:
        skb->mark = HOST_IN_MARK;
        return bpf_redirect(entry->ifindex, BPF_F_INGRESS);
    default:
        return TC_ACT_UNSPEC;
    }
}

// At the egress hooks the packet is on its way already; only a reply into the tunnel turns off.
static __always_inline __u8 action_at(__u32 hook, const struct ct *entry) {
    __u8 action = entry->action;
    if (hook == HOOK_TO_POD || (hook == HOOK_TO_NET && action != ACT_TUNNEL))
        return ACT_STACK;
    if (action == ACT_NEIGH && !entry->ifindex)
        return ACT_STACK;
    return action;
}

static __always_inline int passes_stack_by(__u8 action) {
    return action == ACT_PEER || action == ACT_NEIGH || action == ACT_TUNNEL;
}

static __always_inline int may_fragment(struct __sk_buff *skb) {
#if FAMILY == 4
    struct iphdr *ip = frame(skb) + ETH_HLEN;
    return (void *)(ip + 1) <= frame_end(skb) && !(ip->frag_off & bpf_htons(0x4000));
#else
    return 0;
#endif
}

enum { GO_AHEAD, STACK_ANSWERS, WE_ANSWER };

// Before anything is written: packets that cannot go on have to be answered.
static __always_inline int obstacle(struct __sk_buff *skb, const struct packet *p,
                                    const struct ct *entry, __u8 *action) {
    if (!passes_stack_by(*action))
        return GO_AHEAD;
    if (unlikely(p->ttl <= 1)) {
        count(COUNT_TTL_EXPIRED);
        return STACK_ANSWERS;
    }
    if (*action == ACT_PEER || likely(!too_big(skb, p, entry)))
        return GO_AHEAD;
    if (*action == ACT_TUNNEL && may_fragment(skb))
        return GO_AHEAD; // VXLAN does it
    count(COUNT_TOO_BIG);
    if (*action == ACT_TUNNEL) // to the stack it would be for the node itself
        return WE_ANSWER;
    // The stack tells the sender. It routes by the real destination, but would take a packet
    // with its own address as the source for a forgery.
    if (!addr_equal(&entry->new_src, &p->key.src))
        return STACK_ANSWERS;
    *action = ACT_STACK;
    return GO_AHEAD;
}

static __always_inline int refuse_size(struct __sk_buff *skb, const struct packet *p, __u32 hook,
                                       __u32 mtu) {
    struct flow *flow = policy_flow();
    if (flow) {
        fill_flow(flow, p, hook);
        flow->mtu = mtu;
        jumps.call(skb, JUMP_REJECT);
    }
    count(COUNT_DROP_INTERNAL);
    return TC_ACT_SHOT;
}

static __always_inline int forward(struct __sk_buff *skb, const struct packet *p,
                                   const struct ct *entry, __u32 hook) {
    __u8 action = action_at(hook, entry);
    int answer = obstacle(skb, p, entry, &action);
    if (unlikely(answer == STACK_ANSWERS))
        return TC_ACT_UNSPEC;
    if (unlikely(answer == WE_ANSWER))
        return refuse_size(skb, p, hook, entry->mtu);
    int hop = passes_stack_by(action);
    if (hop || entry->flags & CT_NAT) {
        if (rewrite_network(skb, entry, hop) < 0)
            goto malformed;
        if ((entry->flags & CT_NAT) && rewrite_transport(skb, p, entry) < 0)
            goto malformed;
    }
    return deliver(skb, entry, action);
malformed:
    count(COUNT_DROP_MALFORMED);
    return TC_ACT_SHOT;
}
