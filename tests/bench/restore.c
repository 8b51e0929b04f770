// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// For benchmarks: puts the headers back as they were, then runs the program in slot 0; a repeated
// test run would otherwise feed a packet that is translated already. The `_only` programs are the cost
// of that alone; the `_new` ones give every packet another source port, at PORT in the frame.
#include <uapi/linux/pkt_cls.h>

struct headers {
    __u8 bytes[HEADERS];
};
BPF_TABLE("array", u32, struct headers, saved_headers, 1);
BPF_TABLE("prog", u32, u32, measured, 1);
BPF_TABLE("array", u32, u64, next_port, 1);

static int restore(struct __sk_buff *skb)
{
    __u32 zero = 0;
    void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
    struct headers *saved = saved_headers.lookup(&zero);
    if (!saved || data + HEADERS > end)
        return -1;
    __u64 *to = data, *from = (__u64 *)saved;
#pragma unroll
    for (int i = 0; i < HEADERS / 8; i++)
        to[i] = from[i];
    skb->mark = 0;
    return 0;
}

int restore_only(struct __sk_buff *skb)
{
    return restore(skb) < 0 ? TC_ACT_SHOT : TC_ACT_OK;
}

int restore_and_run(struct __sk_buff *skb)
{
    if (restore(skb) == 0)
        measured.call(skb, 0);
    return TC_ACT_SHOT;
}

static int another_port(struct __sk_buff *skb)
{
    __u32 zero = 0;
    __u64 *next = next_port.lookup(&zero);
    void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
    if (restore(skb) < 0 || !next)
        return -1;
    data = (void *)(long)skb->data;
    end = (void *)(long)skb->data_end;
    if (data + PORT + 2 > end)
        return -1;
    *next += 1;
    *(__be16 *)(data + PORT) = *next;
    return 0;
}

int new_only(struct __sk_buff *skb)
{
    return another_port(skb) < 0 ? TC_ACT_SHOT : TC_ACT_OK;
}

int new_and_run(struct __sk_buff *skb)
{
    if (another_port(skb) == 0)
        measured.call(skb, 0);
    return TC_ACT_SHOT;
}
