/* A libcuda.so.1 that says yes, and prints one line for each call that tests ask about: what really reaches a driver
   through cuda.bindings. A grid of 77 blocks is refused. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { return *value = 1000 * attribute, 0; }
int cuGetErrorString(int error, const char **text) { return *text = "the stub refuses", 0; }

int cuDevicePrimaryCtxRetain(void **context, int device) {
    *context = (void *)(uintptr_t)(0x1000 + device);
    return 0;
}

int cuCtxPushCurrent_v2(void *context) { return printf("push %p\n", context), 0; }
int cuCtxPopCurrent_v2(void **context) { return *context = 0, printf("pop\n"), 0; }

int cuModuleLoadData(void **module, const void *image) {
    *module = (void *)0x2000;
    return printf("load %zu\n", strlen(image)), 0;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = (void *)0x3000;
    return printf("get %p %s\n", module, name), 0;
}

int cuFuncGetAttribute(int *value, int attribute, void *function) { return *value = 32, 0; }

int cuFuncSetAttribute(void *function, int attribute, int value) {
    return printf("attribute %p %d %d\n", function, attribute, value), 0;
}

int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **args, void **extra) {
    printf("launch %p %u %u %u %u %u %u %u %p %p", function, gx, gy, gz, bx, by, bz, shared, stream, (void *)extra);
    printf(" %ju %u %d\n", (uintmax_t) * (uint64_t *)args[0], *(uint32_t *)args[1], *(int32_t *)args[2]);
    return gx == 77;
}

static int not_here(void) { return 999; }

int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
    char newer[256];
    snprintf(newer, sizeof newer, "%s_v2", name);
    Dl_info self;
    dladdr((void *)not_here, &self);
    void *library = dlopen(self.dli_fname, RTLD_NOW);
    *function = dlsym(library, newer);
    if (!*function) *function = dlsym(library, name);
    if (!*function) *function = (void *)not_here;
    if (status) *status = 0;
    return 0;
}
