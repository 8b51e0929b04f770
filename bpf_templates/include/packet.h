// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// From a frame to its 5-tuple. Extension headers, options and fragments are walked, never assumed
// away.

struct packet {
    struct ct_key key;
    __u32 l4; // offset of the transport header in the frame
    __u8 ttl;
    __u8 tcp_flags;
    __u8 fragment;
    __u8 pad;
};

enum { FRAGMENT_NONE, FRAGMENT_FIRST, FRAGMENT_LATER };

enum {
    PARSED_FLOW,
    PARSED_PASS, // neighbour discovery
    PARSED_MALFORMED,
    PARSED_ICMP_ERROR,
    PARSED_LOST_FRAGMENT, // a later fragment whose first was not seen
};

#define MAX_L4_OFFSET 400
#define MAX_EXTENSION_HEADERS 6
#define ICMP6_TIME_EXCEEDED 3
#define ICMP6_LAST_ERROR 4

#if FAMILY == 4
#define L3_SIZE sizeof(struct iphdr)
#else
#define L3_SIZE sizeof(struct ipv6hdr)
#endif
#define HEADERS_SIZE (ETH_HLEN + L3_SIZE + sizeof(struct tcphdr))

static __always_inline void *frame(struct __sk_buff *skb) {
    return (void *)(long)skb->data;
}

static __always_inline void *frame_end(struct __sk_buff *skb) {
    return (void *)(long)skb->data_end;
}

// Makes the first `size` bytes of the frame directly readable, or as many as there are.
static __always_inline void pull(struct __sk_buff *skb, __u32 size) {
    __u32 linear = frame_end(skb) - frame(skb);
    if (unlikely(linear < size && linear < skb->len))
        bpf_skb_pull_data(skb, size < skb->len ? size : skb->len);
}

static __always_inline int is_icmp_error(__u8 type) {
#if FAMILY == 4
    return type == 3 || type == 4 || type == 11 || type == 12;
#else
    return type >= 1 && type <= ICMP6_LAST_ERROR;
#endif
}

static __always_inline int is_icmp_echo(__u8 type) {
#if FAMILY == 4
    return type == 8 || type == 0;
#else
    return type == 128 || type == 129;
#endif
}

// Neighbour discovery (which no router forwards: hop limit 255) and multicast listener reports.
static __always_inline int is_link_management(__u8 type, __u8 hop_limit) {
#if FAMILY == 4
    return 0;
#else
    return (type >= 133 && type <= 137 && hop_limit == 255) ||
           (((type >= 130 && type <= 132) || type == 143) && hop_limit == 1);
#endif
}

static __always_inline int parse_transport(struct __sk_buff *skb, struct packet *p) {
    __u32 offset = p->l4;
    if (offset > MAX_L4_OFFSET)
        return PARSED_MALFORMED;
    __u8 *l4 = frame(skb) + offset;
    void *end = frame_end(skb);
    __u8 proto = p->key.proto;

    if (proto == IPPROTO_TCP) {
        struct tcphdr *tcp = (void *)l4;
        if ((void *)(tcp + 1) > end)
            return PARSED_MALFORMED;
        p->key.sport = tcp->source;
        p->key.dport = tcp->dest;
        p->tcp_flags = l4[13];
        return PARSED_FLOW;
    }
    if (proto == IPPROTO_UDP || proto == IPPROTO_SCTP) {
        __be16 *ports = (void *)l4;
        if (l4 + 8 > (__u8 *)end)
            return PARSED_MALFORMED;
        p->key.sport = ports[0];
        p->key.dport = ports[1];
        return PARSED_FLOW;
    }
    if (proto == FAMILY_ICMP) {
        if (l4 + 8 > (__u8 *)end)
            return PARSED_MALFORMED;
        if (is_icmp_error(l4[0]))
            return PARSED_ICMP_ERROR;
        if (is_link_management(l4[0], p->ttl))
            return PARSED_PASS;
        if (is_icmp_echo(l4[0]))
            p->key.sport = *(__be16 *)(l4 + 4);
    }
    return PARSED_FLOW;
}

// Only a datagram's first fragment has ports; it leaves them for the others.
static __always_inline int parse_fragment(struct __sk_buff *skb, struct packet *p, __u32 id) {
    struct fragment_key key = {.src = p->key.src, .dst = p->key.dst, .id = id};
    key.proto = p->key.proto;
    if (p->fragment == FRAGMENT_LATER) {
        struct fragment *first = fragments.lookup(&key);
        if (!first)
            return PARSED_LOST_FRAGMENT;
        p->key.sport = first->sport;
        p->key.dport = first->dport;
        return PARSED_FLOW;
    }
    int parsed = parse_transport(skb, p);
    if (parsed == PARSED_FLOW) {
        struct fragment ports = {.sport = p->key.sport, .dport = p->key.dport};
        fragments.update(&key, &ports);
    }
    return parsed;
}

#if FAMILY == 4
static __always_inline int parse(struct __sk_buff *skb, struct packet *p) {
    pull(skb, HEADERS_SIZE);
    struct iphdr *ip = frame(skb) + ETH_HLEN;
    if ((void *)(ip + 1) > frame_end(skb) || ip->version != 4 || ip->ihl < 5)
        return PARSED_MALFORMED;
    p->key.src.w[0] = ip->saddr;
    p->key.dst.w[0] = ip->daddr;
    p->key.proto = ip->protocol;
    p->ttl = ip->ttl;
    p->l4 = ETH_HLEN + ip->ihl * 4;
    __u16 offset = ip->frag_off & bpf_htons(0x3fff);
    __u32 id = ip->id;
    if (unlikely(ip->ihl > 5))
        pull(skb, p->l4 + sizeof(struct tcphdr));
    if (likely(!offset))
        return parse_transport(skb, p);
    p->fragment = offset & bpf_htons(0x1fff) ? FRAGMENT_LATER : FRAGMENT_FIRST;
    return parse_fragment(skb, p, id);
}
#else
static __always_inline int is_extension(__u8 header) {
    return header == IPPROTO_HOPOPTS || header == IPPROTO_ROUTING || header == IPPROTO_FRAGMENT ||
           header == IPPROTO_DSTOPTS || header == IPPROTO_AH;
}

// Sets l4 and proto behind the extension headers; the fragment's id where there is one.
static __always_inline int walk_extensions(struct __sk_buff *skb, struct packet *p, __u32 *id) {
    __u8 header = p->key.proto;
    __u32 offset = p->l4;
    for (int i = 0; i < MAX_EXTENSION_HEADERS; i++) {
        __u8 extension[8];
        if (!is_extension(header))
            break;
        if (offset > MAX_L4_OFFSET || bpf_skb_load_bytes(skb, offset, extension, 8) < 0)
            return PARSED_MALFORMED;
        __u32 size = (extension[1] + 1) * 8;
        if (header == IPPROTO_AH)
            size = (extension[1] + 2) * 4;
        if (header == IPPROTO_FRAGMENT) {
            __u16 place = (extension[2] << 8 | extension[3]);
            size = 8;
            __builtin_memcpy(id, extension + 4, 4);
            if (place & 0xfff8)
                p->fragment = FRAGMENT_LATER;
            else if (place & 1)
                p->fragment = FRAGMENT_FIRST;
        }
        header = extension[0];
        offset += size;
        if (p->fragment == FRAGMENT_LATER)
            break; // what follows is payload
    }
    if (is_extension(header) && p->fragment != FRAGMENT_LATER)
        return PARSED_MALFORMED;
    p->key.proto = header;
    p->l4 = offset;
    return PARSED_FLOW;
}

static __always_inline int parse(struct __sk_buff *skb, struct packet *p) {
    pull(skb, HEADERS_SIZE);
    struct ipv6hdr *ip = frame(skb) + ETH_HLEN;
    if ((void *)(ip + 1) > frame_end(skb) || ip->version != 6)
        return PARSED_MALFORMED;
    __builtin_memcpy(&p->key.src, &ip->saddr, sizeof(addr_t));
    __builtin_memcpy(&p->key.dst, &ip->daddr, sizeof(addr_t));
    p->key.proto = ip->nexthdr;
    p->ttl = ip->hop_limit;
    p->l4 = ETH_HLEN + sizeof(*ip);
    if (likely(!is_extension(p->key.proto)))
        return parse_transport(skb, p);
    __u32 id = 0;
    if (walk_extensions(skb, p, &id) != PARSED_FLOW)
        return PARSED_MALFORMED;
    pull(skb, p->l4 + sizeof(struct tcphdr));
    if (likely(p->fragment == FRAGMENT_NONE))
        return parse_transport(skb, p);
    return parse_fragment(skb, p, id);
}
#endif

// What the tail-called programs know of the packet.
static __always_inline void fill_flow(struct flow *flow, const struct packet *p, __u32 hook) {
    __builtin_memset(flow, 0, sizeof(*flow));
    __builtin_memcpy(flow, &p->key, sizeof(p->key));
    flow->new_src = p->key.src;
    flow->new_dst = p->key.dst;
    flow->new_sport = p->key.sport;
    flow->new_dport = p->key.dport;
    flow->hook = hook;
    flow->l4 = p->l4;
    flow->ttl = p->ttl;
    flow->tcp_flags = p->tcp_flags;
    flow->fragment = p->fragment;
}
