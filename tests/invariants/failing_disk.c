/* Preloaded into a writer: the FAIL_AT-th call that puts something on the disk below FAIL_BELOW fails with FAIL_WITH.
   Half of a failing write is written, as a full disk does. Every such call adds a byte to the file COUNT_INTO. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int calls;

static int is_below(const char *path) {
    const char *below = getenv("FAIL_BELOW");
    return below && path && strncmp(path, below, strlen(below)) == 0;
}

static int is_ours(int descriptor) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_below(path);
}

static int fails(void) {
    const char *at = getenv("FAIL_AT");
    const char *into = getenv("COUNT_INTO");
    int count = into ? open(into, O_WRONLY | O_CREAT | O_APPEND, 0666) : -1;
    if (count >= 0) {
        (void)!REAL(write)(count, "+", 1);
        close(count);
    }
    if (++calls != (at ? atoi(at) : -1)) return 0;
    errno = atoi(getenv("FAIL_WITH"));
    return 1;
}

ssize_t write(int descriptor, const void *data, size_t size) {
    if (is_ours(descriptor) && fails()) {
        int kept = errno;
        if (size > 1) REAL(write)(descriptor, data, size / 2);
        errno = kept;
        return -1;
    }
    return REAL(write)(descriptor, data, size);
}

int fsync(int descriptor) { return is_ours(descriptor) && fails() ? -1 : REAL(fsync)(descriptor); }

int rename(const char *from, const char *to) { return is_below(to) && fails() ? -1 : REAL(rename)(from, to); }
