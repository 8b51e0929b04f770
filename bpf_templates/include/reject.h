// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// An answer in the packet's place, sent back as from its destination. No backend: RST to TCP, ICMP
// port unreachable to everything else. Too big for the tunnel: ICMP says how large packets may be.

#define REPLY_TTL 64

struct ethernet_addresses {
    __u8 dst[6];
    __u8 src[6];
};

static __always_inline int swap_ethernet(struct __sk_buff *skb) {
    struct ethernet_addresses from, to;
    if (bpf_skb_load_bytes(skb, 0, &from, sizeof(from)) < 0)
        return -1;
    __builtin_memcpy(to.dst, from.src, 6);
    __builtin_memcpy(to.src, from.dst, 6);
    return bpf_skb_store_bytes(skb, 0, &to, sizeof(to), 0);
}

#if FAMILY == 4
// Network header from the flow's destination to its source, before `size` bytes of `proto`.
static __always_inline void reply_header(const struct flow *flow, struct iphdr *ip, __u8 proto,
                                         __u16 size) {
    __builtin_memset(ip, 0, sizeof(*ip));
    ip->version = 4;
    ip->ihl = 5;
    ip->tot_len = bpf_htons(sizeof(*ip) + size);
    ip->ttl = REPLY_TTL;
    ip->protocol = proto;
    ip->saddr = flow->dst.w[0];
    ip->daddr = flow->src.w[0];
    ip->check = ~fold(fold(bpf_csum_diff(NULL, 0, (__be32 *)ip, sizeof(*ip), 0)));
}
#define NETWORK_HEADER struct iphdr
#else
static __always_inline void reply_header(const struct flow *flow, struct ipv6hdr *ip, __u8 proto,
                                         __u16 size) {
    __builtin_memset(ip, 0, sizeof(*ip));
    ip->version = 6;
    ip->payload_len = bpf_htons(size);
    ip->nexthdr = proto;
    ip->hop_limit = REPLY_TTL;
    __builtin_memcpy(&ip->saddr, &flow->dst, 16);
    __builtin_memcpy(&ip->daddr, &flow->src, 16);
}
#define NETWORK_HEADER struct ipv6hdr
#endif

static __always_inline __u32 pseudo_header_sum(const struct flow *flow, __u8 proto, __u16 size) {
    addr_t both[2] = {flow->dst, flow->src};
    __be32 rest[2] = {bpf_htonl(size), bpf_htonl(proto)};
    __u32 sum = bpf_csum_diff(NULL, 0, (__be32 *)both, sizeof(both), 0);
    return bpf_csum_diff(NULL, 0, rest, sizeof(rest), sum);
}

static __always_inline int build_reset(struct __sk_buff *skb, const struct flow *flow) {
    struct {
        NETWORK_HEADER ip;
        struct tcphdr tcp;
    } reply;
    struct tcphdr syn;
    if (bpf_skb_load_bytes(skb, flow->l4, &syn, sizeof(syn)) < 0)
        return -1;
    reply_header(flow, &reply.ip, IPPROTO_TCP, sizeof(reply.tcp));
    __builtin_memset(&reply.tcp, 0, sizeof(reply.tcp));
    reply.tcp.source = flow->dport;
    reply.tcp.dest = flow->sport;
    reply.tcp.ack_seq = bpf_htonl(bpf_ntohl(syn.seq) + 1);
    reply.tcp.doff = 5;
    reply.tcp.rst = 1;
    reply.tcp.ack = 1;
    __u32 sum = pseudo_header_sum(flow, IPPROTO_TCP, sizeof(reply.tcp));
    sum = bpf_csum_diff(NULL, 0, (__be32 *)&reply.tcp, sizeof(reply.tcp), sum);
    reply.tcp.check = ~fold(fold(sum));
    if (bpf_skb_change_tail(skb, ETH_HLEN + sizeof(reply), 0) < 0)
        return -1;
    return bpf_skb_store_bytes(skb, ETH_HLEN, &reply, sizeof(reply), 0);
}

// What the error quotes: the network header and the first 8 bytes behind it.
#define QUOTED (sizeof(NETWORK_HEADER) + 8)

static __always_inline int build_error(struct __sk_buff *skb, const struct flow *flow) {
    struct {
        NETWORK_HEADER ip;
        __u8 type;
        __u8 code;
        __sum16 check;
        __be32 mtu;
        __u8 quoted[QUOTED];
    } reply;
    const __u32 size = 8 + QUOTED;
    reply_header(flow, &reply.ip, FAMILY_ICMP, size);
    if (flow->mtu) {
        reply.type = FAMILY == 4 ? 3 : 2;
        reply.code = FAMILY == 4 ? 4 : 0;
    } else {
        reply.type = FAMILY == 4 ? 3 : 1;
        reply.code = FAMILY == 4 ? 3 : 4;
    }
    reply.check = 0;
    reply.mtu = bpf_htonl(flow->mtu);
    if (bpf_skb_load_bytes(skb, ETH_HLEN, reply.quoted, QUOTED) < 0)
        return -1;
    __u32 sum = FAMILY == 4 ? 0 : pseudo_header_sum(flow, FAMILY_ICMP, size);
    sum = bpf_csum_diff(NULL, 0, (__be32 *)&reply.type, size, sum);
    reply.check = ~fold(fold(sum));
    if (bpf_skb_change_tail(skb, ETH_HLEN + sizeof(reply), 0) < 0)
        return -1;
    return bpf_skb_store_bytes(skb, ETH_HLEN, &reply, sizeof(reply), 0);
}

static __always_inline int reject_flow(struct __sk_buff *skb) {
    struct flow *flow = policy_flow();
    if (!flow)
        return TC_ACT_SHOT;
    int reset = flow->proto == IPPROTO_TCP && !flow->mtu;
    int built = reset ? build_reset(skb, flow) : build_error(skb, flow);
    if (built < 0 || swap_ethernet(skb) < 0) {
        count(COUNT_DROP_INTERNAL);
        return TC_ACT_SHOT;
    }
    if (!flow->mtu)
        count(COUNT_REJECTED);
    if (flow->hook == HOOK_TO_NET) // back to the node's own process
        return bpf_redirect(skb->ifindex, BPF_F_INGRESS);
    if (flow->hook != HOOK_FROM_POD)
        return bpf_redirect(skb->ifindex, 0);
    if (skb->pkt_type != PACKET_HOST)
        bpf_skb_change_type(skb, PACKET_HOST);
    return bpf_redirect_peer(skb->ifindex, 0);
}
