// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// Services for sockets: the address is exchanged before there is a packet. Those of the node
// always, those of its pods as connectTimeLoadBalancing says.
// `mapped`: an IPv6 socket that speaks IPv4 (::ffff:a.b.c.d).

#define NOT_ALLOWED 0 // what a cgroup program returns
#define GO_ON 1
#define CONNECTION_REFUSED (-111)
#define HOST_UNREACHABLE (-113)

struct name {
    addr_t addr;
    __be16 port;
    __u8 proto;
};

static __always_inline int refuse(int error) {
    bpf_set_retval(error);
    return NOT_ALLOWED;
}

// Whose socket it is. `addr` is the client that affinity and source ranges are about.
struct caller {
    addr_t addr;
    int pod;
};

static __always_inline int on_node(struct bpf_sock_addr *ctx, const struct settings *node) {
    return bpf_get_netns_cookie(ctx) == node->host_netns_cookie;
}

// 0: the socket is left alone. That of a namespace which is not known as a pod's, or not yet: its
// packets are translated, if it is a pod.
static __always_inline int find_caller(struct bpf_sock_addr *ctx, const struct settings *node,
                                       __u32 pod_modes, struct caller *caller) {
    struct namespace_key key = {.cookie = bpf_get_netns_cookie(ctx)};
    if (key.cookie == node->host_netns_cookie) {
        node_address(node, &caller->addr);
        return 1;
    }
    if (!(node->flags & pod_modes))
        return 0;
    struct namespace *found = pod_namespaces.lookup(&key);
    if (!found)
        return 0;
    caller->addr = found->addr;
    caller->pod = 1;
    return 1;
}

// 0: not an address of this family.
static __always_inline int read_name(struct bpf_sock_addr *ctx, int mapped, struct name *name) {
#if FAMILY == 4
    if (!mapped) {
        name->addr.w[0] = ctx->user_ip4;
    } else {
        if (ctx->user_ip6[0] || ctx->user_ip6[1] || ctx->user_ip6[2] != MAPPED_WORD)
            return 0;
        name->addr.w[0] = ctx->user_ip6[3];
    }
#else
    if (!ctx->user_ip6[0] && !ctx->user_ip6[1] && ctx->user_ip6[2] == MAPPED_WORD)
        return 0; // IPv4: the mapped program's
    name->addr.w[0] = ctx->user_ip6[0];
    name->addr.w[1] = ctx->user_ip6[1];
    name->addr.w[2] = ctx->user_ip6[2];
    name->addr.w[3] = ctx->user_ip6[3];
#endif
    name->port = ctx->user_port;
    name->proto = ctx->protocol;
    return name->proto == IPPROTO_TCP || name->proto == IPPROTO_UDP;
}

static __always_inline void write_name(struct bpf_sock_addr *ctx, int mapped, const addr_t *addr,
                                       __be16 port) {
#if FAMILY == 4
    if (mapped)
        ctx->user_ip6[3] = addr->w[0];
    else
        ctx->user_ip4 = addr->w[0];
#else
    ctx->user_ip6[0] = addr->w[0];
    ctx->user_ip6[1] = addr->w[1];
    ctx->user_ip6[2] = addr->w[2];
    ctx->user_ip6[3] = addr->w[3];
#endif
    ctx->user_port = port;
}

static __always_inline int is_loopback(const addr_t *a) {
#if FAMILY == 4
    return (a->w[0] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
#else
    return !a->w[0] && !a->w[1] && !a->w[2] && a->w[3] == bpf_htonl(1);
#endif
}

// A pod's loopback is its own.
static __always_inline struct frontend *frontend_of_name(const struct name *name, int pod) {
    struct frontend *frontend = frontend_of(&name->addr, name->port, name->proto);
    if (frontend)
        return frontend;
    __u32 *own = own_addresses.lookup((struct address_key *)&name->addr);
    if (own || (!pod && is_loopback(&name->addr)))
        return !own || *own & 1 ? frontend_of_node(name->port, name->proto) : NULL;
    frontend = shared_node_port(&name->addr, name->port, name->proto);
    return frontend ? frontend : frontend_of(&name->addr, 0, 0);
}

static __always_inline void socket_key(struct bpf_sock_addr *ctx, __u8 kind, const addr_t *addr,
                                       __be16 port, struct socket_key *key) {
    __u64 cookie = bpf_get_socket_cookie(ctx);
    __builtin_memset(key, 0, sizeof(*key));
    key->cookie_low = cookie;
    key->cookie_high = cookie >> 32;
    key->addr = *addr;
    key->port = port;
    key->proto = ctx->protocol;
    key->kind = kind;
}

// Maps of their own: the many connections of TCP would drive out what UDP sockets live by.
static __always_inline struct socket *find_socket(const struct socket_key *key) {
    if (key->proto == IPPROTO_TCP)
        return tcp_sockets.lookup((struct socket_key *)key);
    return sockets.lookup((struct socket_key *)key);
}

static __always_inline void keep_socket(struct socket_key *key, struct socket *value) {
    if (key->proto == IPPROTO_TCP)
        tcp_sockets.update(key, value);
    else
        sockets.update(key, value);
}

// So that recvmsg and getpeername can show the service instead of the backend.
static __always_inline void remember_service(struct bpf_sock_addr *ctx, const struct name *service,
                                             const addr_t *backend, __be16 port) {
    struct socket_key key;
    struct socket value = {.addr = service->addr, .port = service->port};
    socket_key(ctx, SOCKET_SERVICE, backend, port, &key);
    struct socket *known = find_socket(&key);
    if (!known || known->port != value.port || !addr_equal(&known->addr, &value.addr))
        keep_socket(&key, &value);
}

static __always_inline struct backend *choose_for(const struct caller *caller,
                                                  const struct frontend *frontend, __u32 *id) {
    __u32 kind = frontend->flags & FRONTEND_INTERNAL_LOCAL ? LIST_LOCAL : LIST_CLUSTER;
    if (!client_allowed(frontend, &caller->addr))
        return NULL;
    return choose_backend(frontend, kind, &caller->addr, bpf_get_prandom_u32(), id);
}

// A pod's packet is refused or dropped as the contract says; a node's would never be seen.
static __always_inline int no_backend(const struct caller *caller,
                                      const struct frontend *frontend) {
    if (caller->pod)
        return GO_ON;
    return refuse(frontend->flags & FRONTEND_INTERNAL_DROP ? HOST_UNREACHABLE : CONNECTION_REFUSED);
}

// A pod that is its own backend: its packets come back to it masqueraded. Translated here, they
// would never leave it, and it would see itself as the client.
static __always_inline int is_hairpin(const struct caller *caller, const addr_t *backend) {
    return caller->pod && addr_equal(&caller->addr, backend);
}

// Of an address that no service has: may the socket go there? Not where only services are.
static __always_inline int pass_by(const struct name *name) {
    if (in_service_range(&name->addr) && !own_address(&name->addr) && !identity_of(&name->addr))
        return refuse(HOST_UNREACHABLE);
    return GO_ON;
}

static __always_inline int connect_to_service(struct bpf_sock_addr *ctx, int mapped) {
    struct settings *node = node_settings();
    struct caller caller = {};
    struct name name = {};
    __u32 id = 0;
    if (!node || !read_name(ctx, mapped, &name))
        return GO_ON;
    __u32 mode = name.proto == IPPROTO_TCP ? SETTINGS_CONNECT_TCP : SETTINGS_CONNECT_UDP;
    if (!find_caller(ctx, node, mode, &caller))
        return GO_ON;
    struct frontend *frontend = frontend_of_name(&name, caller.pod);
    if (!frontend)
        return caller.pod ? GO_ON : pass_by(&name);
    struct backend *backend = choose_for(&caller, frontend, &id);
    if (!backend)
        return no_backend(&caller, frontend);
    if (is_hairpin(&caller, &backend->addr))
        return GO_ON;
    remember_service(ctx, &name, &backend->addr, backend->port);
    write_name(ctx, mapped, &backend->addr, backend->port);
    return GO_ON;
}

// The backend that an unconnected socket sent to before, while there is one.
static __always_inline struct backend *chosen_before(struct socket_key *key) {
    struct socket *choice = sockets.lookup(key);
    if (!choice)
        return NULL;
    __u32 id = choice->backend;
    struct backend *backend = backends.lookup(&id);
    if (!backend || !addr_equal(&backend->addr, &choice->addr) || backend->port != choice->port)
        return NULL;
    return backend;
}

// An unconnected socket stays with its backend, as it would with conntrack; in a pod also when the
// mode is another by now.
static __always_inline int send_to_service(struct bpf_sock_addr *ctx, int mapped) {
    struct settings *node = node_settings();
    struct caller caller = {};
    struct name name = {};
    struct socket_key key;
    __u32 id = 0;
    if (!node || !read_name(ctx, mapped, &name) ||
        !find_caller(ctx, node, SETTINGS_CONNECT_UDP_USED, &caller))
        return GO_ON;
    struct frontend *frontend = frontend_of_name(&name, caller.pod);
    if (!frontend)
        return caller.pod ? GO_ON : pass_by(&name);

    socket_key(ctx, SOCKET_CHOICE, &name.addr, name.port, &key);
    struct backend *backend = chosen_before(&key);
    if (!backend) {
        if (caller.pod && !(node->flags & SETTINGS_CONNECT_UDP))
            return GO_ON;
        backend = choose_for(&caller, frontend, &id);
        if (!backend)
            return no_backend(&caller, frontend);
        struct socket value = {.addr = backend->addr, .port = backend->port, .backend = id};
        sockets.update(&key, &value);
    }
    if (is_hairpin(&caller, &backend->addr))
        return GO_ON;
    remember_service(ctx, &name, &backend->addr, backend->port);
    write_name(ctx, mapped, &backend->addr, backend->port);
    return GO_ON;
}

// Whatever the mode is by now: what is remembered of a socket is by its cookie.
static __always_inline int show_service(struct bpf_sock_addr *ctx, int mapped) {
    struct settings *node = node_settings();
    struct name name = {};
    struct socket_key key;
    if (!node || !read_name(ctx, mapped, &name))
        return GO_ON;
    if (name.proto == IPPROTO_UDP && !(node->flags & SETTINGS_CONNECT_UDP_USED) &&
        !on_node(ctx, node))
        return GO_ON;
    socket_key(ctx, SOCKET_SERVICE, &name.addr, name.port, &key);
    struct socket *service = find_socket(&key);
    if (service)
        write_name(ctx, mapped, &service->addr, service->port);
    return GO_ON;
}
