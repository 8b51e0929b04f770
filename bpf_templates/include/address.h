// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// Addresses of either family: `addr_t` is one word or four, in network order.

#ifndef likely
#define likely(x) __builtin_expect(!!(x), 1)
#endif
#ifndef unlikely
#define unlikely(x) __builtin_expect(!!(x), 0)
#endif

#define ADDR_WORDS (sizeof(addr_t) / 4)
#define ADDR_BITS (sizeof(addr_t) * 8)
#define MAPPED_WORD bpf_htonl(0xffff)
#define SECOND 1000000000ULL

#if FAMILY == 4
#define FAMILY_PROTOCOL bpf_htons(ETH_P_IP)
#define FAMILY_ICMP IPPROTO_ICMP
#define FAMILY_AF 2
#else
#define FAMILY_PROTOCOL bpf_htons(ETH_P_IPV6)
#define FAMILY_ICMP IPPROTO_ICMPV6
#define FAMILY_AF 10
#endif

static __always_inline int addr_equal(const addr_t *a, const addr_t *b) {
#if FAMILY == 4
    return a->w[0] == b->w[0];
#else
    return a->w[0] == b->w[0] && a->w[1] == b->w[1] && a->w[2] == b->w[2] && a->w[3] == b->w[3];
#endif
}

// A node's address as the 16 bytes of `nodes`: IPv4 as ::ffff:a.b.c.d.
static __always_inline void addr_to_node(const addr_t *a, struct node_key *node) {
    __be32 *w = (__be32 *)node->addr;
#if FAMILY == 4
    w[0] = 0;
    w[1] = 0;
    w[2] = MAPPED_WORD;
    w[3] = a->w[0];
#else
    w[0] = a->w[0];
    w[1] = a->w[1];
    w[2] = a->w[2];
    w[3] = a->w[3];
#endif
}

static __always_inline void copy_node(__u8 *to, const __u8 *from) {
    __be32 *t = (__be32 *)to;
    const __be32 *f = (const __be32 *)from;
    t[0] = f[0];
    t[1] = f[1];
    t[2] = f[2];
    t[3] = f[3];
}

static __always_inline int same_node(const __u8 *a, const __u8 *b) {
    const __be32 *x = (const __be32 *)a;
    const __be32 *y = (const __be32 *)b;
    return x[0] == y[0] && x[1] == y[1] && x[2] == y[2] && x[3] == y[3];
}

static __always_inline void count(__u32 reason) {
    struct counter *c = counters.lookup(&reason);
    if (c)
        c->packets++;
}

static __always_inline struct settings *node_settings(void) {
    __u32 zero = 0;
    return settings.lookup(&zero);
}

// The node's main address of this family.
static __always_inline void node_address(const struct settings *node, addr_t *to) {
#if FAMILY == 4
    __builtin_memcpy(to, node->node4, sizeof(*to));
#else
    __builtin_memcpy(to, node->node6, sizeof(*to));
#endif
}

static __always_inline int own_address(const addr_t *a) {
    return own_addresses.lookup((struct address_key *)a) != NULL;
}

static __always_inline struct endpoint *endpoint_of(const addr_t *a) {
    return endpoints.lookup((struct address_key *)a);
}

static __always_inline struct identity *identity_of(const addr_t *a) {
    return identities.lookup((struct address_key *)a);
}
