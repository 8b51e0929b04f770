// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* The benchmark's traffic, without a language runtime in the way. Runs in a pod's network namespace.
 *
 *   load serve ID PORT...                  answers each request with one byte, ID, and closes
 *   load connect ADDRESS PORT SAMPLES      prints one connect() time in ns a line; closes by RST
 *   load crr ADDRESS PORT SECONDS          connect, request, answer, close: prints the count
 *   load total ADDRESS PORT SAMPLES        prints "connect total" in ns a line, as curl names them
 *   load watch ADDRESS PORT SECONDS        prints "monotonic_ns ID" when another server answers
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define EVENTS 256

static long long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void die(const char *what)
{
	fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
	exit(1);
}

static struct sockaddr_in to_address(const char *address, const char *port)
{
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};

	if (inet_pton(AF_INET, address, &to.sin_addr) != 1)
		die("address");
	return to;
}

static int opened(const struct sockaddr_in *to, int milliseconds)
{
	struct timeval limit = {milliseconds / 1000, milliseconds % 1000 * 1000};
	int s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (s < 0)
		die("socket");
	setsockopt(s, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
	setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
	if (connect(s, (const struct sockaddr *)to, sizeof(*to))) {
		close(s);
		return -1;
	}
	return s;
}

/* RST instead of FIN: no TIME_WAIT holds the port. */
static void reset(int s)
{
	struct linger at_once = {1, 0};

	setsockopt(s, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once));
	close(s);
}

/* One request on an open connection; the server's byte, or -1. */
static int answer(int s)
{
	char byte;

	if (write(s, "r", 1) != 1 || read(s, &byte, 1) != 1)
		return -1;
	return (unsigned char)byte;
}

static void measure_connect(struct sockaddr_in to, int samples)
{
	for (int i = 0; i < samples; i++) {
		long long start = now(), spent;
		int s = opened(&to, 5000);

		spent = now() - start;
		if (s < 0)
			die("connect");
		reset(s);
		printf("%lld\n", spent);
	}
}

static void measure_total(struct sockaddr_in to, int samples)
{
	for (int i = 0; i < samples; i++) {
		long long start = now(), connected;
		int s = opened(&to, 5000);

		connected = now() - start;
		if (s < 0 || answer(s) < 0)
			die("request");
		printf("%lld %lld\n", connected, now() - start);
		reset(s);
	}
}

static void measure_crr(struct sockaddr_in to, int seconds)
{
	long long start = now(), end = start + seconds * 1000000000LL, count = 0;

	for (; now() < end; count++) {
		int s = opened(&to, 5000);

		if (s < 0 || answer(s) < 0)
			die("request");
		reset(s);
	}
	printf("%lld %lld\n", count, now() - start);
}

static void watch(struct sockaddr_in to, int seconds)
{
	long long end = now() + seconds * 1000000000LL;
	int last = -1;

	setvbuf(stdout, NULL, _IOLBF, 0);
	while (now() < end) {
		int s = opened(&to, 50), who = s < 0 ? -1 : answer(s);
		long long seen = now();

		if (s >= 0)
			reset(s);
		if (who >= 0 && who != last) {
			printf("%lld %c\n", seen, who);
			last = who;
		}
		usleep(500);
	}
}

static void listen_on(int ep, const char *port)
{
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
	struct epoll_event event = {.events = EPOLLIN};
	int one = 1, s = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (s < 0 || bind(s, (struct sockaddr *)&at, sizeof(at)) || listen(s, 4096))
		die("listen");
	event.data.u64 = (1ULL << 32) | s;
	epoll_ctl(ep, EPOLL_CTL_ADD, s, &event);
}

static void serve(char id, char **ports, int count)
{
	struct epoll_event events[EVENTS];
	int ep = epoll_create1(EPOLL_CLOEXEC);

	for (int i = 0; i < count; i++)
		listen_on(ep, ports[i]);
	puts("ready");
	fflush(stdout);
	for (;;) {
		int found = epoll_wait(ep, events, EVENTS, -1);

		for (int i = 0; i < found; i++) {
			int s = (int)events[i].data.u64;
			char byte;

			if (events[i].data.u64 >> 32) {
				struct epoll_event client = {.events = EPOLLIN};
				int c;

				while ((c = accept4(s, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
					client.data.u64 = c;
					epoll_ctl(ep, EPOLL_CTL_ADD, c, &client);
				}
				continue;
			}
			if (read(s, &byte, 1) == 1 && write(s, &id, 1) != 1)
				perror("load: write");
			close(s);
		}
	}
}

int main(int argc, char **argv)
{
	const char *what = argc > 3 ? argv[1] : "";

	if (!strcmp(what, "serve"))
		serve(argv[2][0], argv + 3, argc - 3);
	else if (argc < 5)
		return fprintf(stderr, "usage: see the head of load.c\n"), 2;
	else if (!strcmp(what, "connect"))
		measure_connect(to_address(argv[2], argv[3]), atoi(argv[4]));
	else if (!strcmp(what, "crr"))
		measure_crr(to_address(argv[2], argv[3]), atoi(argv[4]));
	else if (!strcmp(what, "total"))
		measure_total(to_address(argv[2], argv[3]), atoi(argv[4]));
	else if (!strcmp(what, "watch"))
		watch(to_address(argv[2], argv[3]), atoi(argv[4]));
	else
		return fprintf(stderr, "load: unknown: %s\n", what), 2;
	return 0;
}
